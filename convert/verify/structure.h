// What the files of a converted checkpoint say before anything is run: a forward pass sees only the rows and
// experts that its tokens reach.
#pragma once

#include <string>
#include <vector>

#include "convert/model/model.h"

namespace relatent {

struct Structure {
  Index copied = 0;     // tensors that are the source's byte for byte
  Index cast = 0;       // the source's numbers in another dtype
  Index converted = 0;  // tensors of the attention, which the source does not have
  // What is not as a conversion leaves it, a sentence for each: a tensor outside the attention with other
  // numbers than the source's, any tensor with NaN or infinity, a tokenizer or another file of the source
  // that is missing or changed, a token id or context length of the config that is not the source's.
  std::vector<std::string> findings;
};

// Reads every tensor of both once. Throws Error as reading them does.
Structure check_structure(const Model& source, const Model& converted);

}  // namespace relatent
