// What the files of a converted checkpoint say before anything is run: a forward pass sees only the rows and
// experts that its tokens reach.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "convert/model/model.h"
#include "convert/verify/conversion_report.h"

namespace relatent {

struct Structure {
  Index copied = 0;     // tensors that are the source's byte for byte
  Index cast = 0;       // the source's numbers in another dtype
  Index converted = 0;  // tensors of the attention, which the source does not have
  Index checked = 0;    // of the cast and converted ones, those whose bytes are what convert wrote
  // What is not as a conversion leaves it, a sentence for each: a tensor outside the attention with other
  // numbers than the source's, a tensor or file with another checksum than in the report, a tokenizer or
  // another file of the source that is missing or changed, a token id or context length of the config that is
  // not the source's, a file that nobody wrote and an engine would load.
  std::vector<std::string> findings;
  std::vector<std::string> not_finite;  // tensors that hold NaN or infinity, a sentence for each
};

// The report of a checkpoint folder, or nothing when there is none; what is wrong with one that cannot be
// believed goes to `findings`.
std::optional<ConversionReport> find_report(const Model& converted, std::vector<std::string>& findings);

// Reads every tensor of both once. report: nothing when there is none, and then the converted tensors are
// only looked at for NaN and infinity. Throws Error as reading them does.
Structure check_structure(const Model& source, const Model& converted,
                          const std::optional<ConversionReport>& report);

}  // namespace relatent
