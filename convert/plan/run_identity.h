// What decides the bytes of a conversion, for the journal of an unfinished one.
#pragma once

#include "convert/plan/options.h"
#include "formats/journal.h"

namespace relatent {

// Program, every option that reaches the output as the command line gave it, source and calibration. Throws
// Error (input, machine) when a file cannot be examined.
RunIdentity run_identity(const ConvertOptions& options, const Checkpoint& source);
// Throws Error (input) when source or calibration changed since then: what was read of them may be neither
// the one nor the other.
void require_unchanged_inputs(const RunIdentity& before, const ConvertOptions& options,
                              const Checkpoint& source);

}  // namespace relatent
