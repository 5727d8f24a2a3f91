// Where the tensors of a converted model go: a checkpoint folder (checkpoint.h) or a single file. All of them
// are announced when it is opened.
#pragma once

#include <cstdint>
#include <span>
#include <string>

namespace relatent {

class Checkpoint;

class TensorSink {
 public:
  TensorSink() = default;
  TensorSink(const TensorSink&) = delete;
  TensorSink& operator=(const TensorSink&) = delete;
  virtual ~TensorSink() = default;

  // Different tensors may be written by several threads at once, in any order, each once
  // (std::invalid_argument otherwise, and for one that was not announced).
  // Narrows float32 values to the tensor's dtype. Throws Error (input) when a value is not finite or
  // overflows the dtype, naming the tensor.
  virtual void write_floats(const std::string& name, std::span<const float> values) = 0;
  // The bytes of the source's tensor source_name, whose dtype and shape must be the same.
  virtual void copy(const std::string& name, const Checkpoint& source, const std::string& source_name) = 0;

  // Counts a tensor that an earlier process has written as written.
  virtual void mark_written(const std::string& name) = 0;
  // XXH3-128 of the bytes that write_floats gave the tensor; empty when this object has not written it.
  virtual std::string checksum(const std::string& name) const = 0;
  // XXH3-128 of the tensor's bytes as they lie in the file now.
  virtual std::string stored_checksum(const std::string& name) const = 0;
  // What was written so far is on the disk when this returns, and outlives this object.
  virtual void flush() = 0;
  // Everything is written (std::logic_error otherwise): the output is complete and on the disk.
  virtual void finish() = 0;
  // Of the weight files, headers included.
  virtual std::uint64_t bytes_written() const = 0;
};

}  // namespace relatent
