// A calibration store (formats/calibration_store.h) whose bytes were damaged. The checksums that HDF5 keeps
// of its metadata are left wrong: libhdf5 does not survive all that can stand behind a right one, and damage
// puts none there. calibration_contents.cc is about stores that libhdf5 finds nothing wrong with.
#include "tests/attack/fuzz/fuzz.h"
#include "tests/attack/fuzz/stores.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace relatent;
  fuzz::touch_store(fuzz::put("store.h5", fuzz::text_of(data, size)));
  return 0;
}
