// What a GGUF file says of a tokenizer, taken from the files of a Hugging Face folder.
//
// Written for llama.cpp, which wants what its own converter writes (_set_vocab_gpt2 in its
// conversion/base.py, SpecialVocab in its gguf package): https://github.com/ggml-org/llama.cpp
#pragma once

#include <cstdint>
#include <filesystem>
#include <nlohmann/json_fwd.hpp>
#include <string>

#include "formats/gguf.h"

namespace relatent {

// The keys that begin with "tokenizer." for a byte-level BPE tokenizer (GPT-2, Llama 3, Qwen2, SmolLM2 ...):
// model "gpt2", pre, tokens, token_type, merges, the ids of bos, eos, unk and pad as far as they are known,
// add_bos_token, add_eos_token, chat_template where there is one.
//
// Reads tokenizer.json of the folder and, where they exist, tokenizer_config.json and chat_template.jinja;
// config is the folder's config.json. The names of special tokens in tokenizer_config.json come before the
// ids of config.json, where the first of a list counts and one outside of the vocabulary does not. llama.cpp
// takes token 11 for a bos or eos that nothing names. A bos is added where tokenizer_config.json says
// add_bos_token or, when that is silent, where the tokenizer's template begins with it; eos likewise.
//
// pre is llama.cpp's name for how text is cut before merging: "llama-bpe", "qwen2", "smollm", "gpt-2",
// "default" ... When it is empty, it is found from tokenizer.json, of which these four are known besides
// "smaug-bpe", which is "llama-bpe" with merges inside of whole words.
//
// Tokens that tokenizer.json leaves out up to vocab_size are unused ones named "[PAD{id}]".
//
// Throws Error (input), saying that no_vocab is the way out: no tokenizer.json, another model than byte-level
// BPE, a pre-tokenizer that is not known (pre empty). Likewise for ids that are not below vocab_size, given
// twice or at odds with each other, two tokens with one text, merges of what is no token. Throws
// std::invalid_argument for a vocab_size that is not positive or above 2^31 - 1.
GgufMetadata gguf_tokenizer(const std::filesystem::path& folder, const nlohmann::ordered_json& config,
                            const std::string& pre, std::int64_t vocab_size);

// The same for a file without a tokenizer, whose engine takes and gives token ids alone: model "no_vocab".
// Such a file needs the key "<architecture>.vocab_size" besides. llama.cpp's server
// loads it, but aborts on the first completion, for which it wants text.
GgufMetadata gguf_no_vocab();

}  // namespace relatent
