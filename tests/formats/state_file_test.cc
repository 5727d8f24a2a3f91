#include "formats/state_file.h"

#include <gtest/gtest.h>

#include <string>

#include "linalg/matrix.h"
#include "tests/support/temp_folder.h"

namespace relatent {
namespace {

using testing_support::read_bytes;
using testing_support::TempFolder;

TEST(StateFile, ComesBackWhole) {
  const TempFolder folder;
  const MatrixF a = MatrixF::Random(5, 3);
  const VectorD b = VectorD::Random(7);
  {
    PendingFile pending = write_state(folder / "state", 4, {bytes_of(a), bytes_of(b), {}});
    EXPECT_FALSE(std::filesystem::exists(folder / "state"));
    pending.commit();
  }
  MatrixF a_read(5, 3);
  VectorD b_read(7);
  EXPECT_EQ(read_state(folder / "state", {writable_bytes_of(a_read), writable_bytes_of(b_read), {}}), 4);
  EXPECT_EQ(a, a_read);
  EXPECT_EQ(b, b_read);
}

TEST(StateFile, IsNotBelievedWhenItIsNotWhole) {
  const TempFolder folder;
  const VectorD a = VectorD::Random(3);
  write_state(folder / "state", 2, {bytes_of(a)}).commit();
  const std::string whole = read_bytes(folder / "state");
  VectorD read = VectorD::Zero(3);
  const auto number = [&](const std::string& bytes) {
    return read_state(folder.write("other", bytes), {writable_bytes_of(read)});
  };
  for (std::size_t i = 0; i < whole.size(); ++i) {
    std::string changed = whole;
    changed[i] = static_cast<char>(changed[i] ^ 4);
    EXPECT_EQ(number(changed), std::nullopt) << i;
    EXPECT_EQ(number(whole.substr(0, i)), std::nullopt) << i;
  }
  EXPECT_EQ(number(whole + "x"), std::nullopt);
  EXPECT_EQ(read_state(folder / "missing", {writable_bytes_of(read)}), std::nullopt);
  EXPECT_EQ(read_state(folder.path(), {writable_bytes_of(read)}), std::nullopt);
  EXPECT_EQ(read, VectorD::Zero(3));
  VectorD longer(4);
  EXPECT_EQ(read_state(folder / "state", {writable_bytes_of(longer)}), std::nullopt);
  write_state(folder / "negative", -1, {bytes_of(a)}).commit();
  EXPECT_EQ(read_state(folder / "negative", {writable_bytes_of(read)}), std::nullopt);
  EXPECT_EQ(number(whole), 2);
  EXPECT_EQ(read, a);
}

}  // namespace
}  // namespace relatent
