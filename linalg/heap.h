// The C library's heap, for a program that asks for the same matrices again for every layer. Elsewhere than
// with the GNU C library these do nothing.
#pragma once

namespace relatent {

// Keeps what is freed for the next matrix, where the library would map each anew and have its pages cleared.
// The largest are mapped all the same: between smaller ones they would leave holes. Call it before any other
// thread starts.
void keep_freed_memory();

// Gives back what is free now. Between layers, so that holes which one of them leaves do not add up over all.
void return_freed_memory();

}  // namespace relatent
