// What a complaint must look like.
#pragma once

#include <gtest/gtest.h>

#include <exception>
#include <string>
#include <vector>

#include "formats/error.h"

namespace relatent::testing_support {

// Expects that body throws an Error of that kind whose one-line sentence holds all the parts.
template <typename Body>
void expect_error(ErrorKind kind, const std::vector<std::string>& parts, Body&& body) {
  try {
    body();
  } catch (const Error& error) {
    const std::string sentence = error.what();
    EXPECT_EQ(static_cast<int>(error.kind()), static_cast<int>(kind)) << sentence;
    EXPECT_EQ(sentence.find('\n'), std::string::npos) << sentence;
    for (const std::string& part : parts) {
      EXPECT_NE(sentence.find(part), std::string::npos) << "no \"" << part << "\" in: " << sentence;
    }
    return;
  } catch (const std::exception& other) {
    ADD_FAILURE() << "not an Error: " << other.what();
    return;
  }
  ADD_FAILURE() << "nothing was thrown";
}

}  // namespace relatent::testing_support
