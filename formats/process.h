// What a program that reads and writes files does before and after its work, so that what goes wrong with
// them ends in a sentence.
#pragma once

namespace relatent {

// Call it before any file is opened and any thread started. Writing beyond the limit on the size of files
// (ulimit -f) becomes an error like a full disk, where it would end the program with files left behind.
// A source that is cut while it is read is named (report_cut_files). Standard streams that the caller closed
// are opened again, for nothing: a file that is opened later would get their number, and with it what the
// program prints.
void prepare_process();

// Writes out what stdout and std::cout still hold. Throws Error (machine) when that, or anything printed
// before, could not be written.
void finish_stdout();

}  // namespace relatent
