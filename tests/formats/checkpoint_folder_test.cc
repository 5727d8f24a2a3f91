#include <gtest/gtest.h>

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include "formats/checkpoint.h"
#include "tests/support/expect_error.h"
#include "tests/support/temp_folder.h"

namespace relatent {
namespace {

namespace fs = std::filesystem;
using testing_support::bytes_of;
using testing_support::expect_error;
using testing_support::TempFolder;
using testing_support::text_of;

// A file of u8 vectors, each of as many bytes as its name has, which also are its contents.
void write_shard(const fs::path& path, const std::vector<std::string>& names) {
  std::vector<TensorSpec> specs;
  specs.reserve(names.size());
  for (const std::string& name : names) {
    specs.push_back({name, DType::u8, {static_cast<std::int64_t>(name.size())}});
  }
  SafetensorsWriter writer(path, specs);
  for (const std::string& name : names) {
    writer.write(name, bytes_of(name));
  }
  writer.finish();
}

std::string index_text(const std::string& weight_map) {
  return R"({"metadata":{"total_size":1},"weight_map":)" + weight_map + "}";
}

TEST(Checkpoint, SingleFileRefusals) {
  const TempFolder folder;
  const auto open = [&] { Checkpoint::open(folder.path()); };
  expect_error(ErrorKind::input, {"missing"}, [&] { Checkpoint::open(folder / "missing"); });
  expect_error(ErrorKind::input, {"config.json", "cannot open"}, open);
  folder.write("config.json", "[]");
  expect_error(ErrorKind::input, {"config.json", "a JSON object", "a JSON array"}, open);
  folder.write("config.json", "{\"a\":");
  expect_error(ErrorKind::input, {"config.json", "not valid JSON"}, open);
  folder.write("config.json", R"({"a":1,"a":2})");
  expect_error(ErrorKind::input, {"config.json", "twice"}, open);
  folder.write("config.json", "{}");
  expect_error(ErrorKind::input, {folder.path().string(), "either model.safetensors or", "found neither"},
               open);
  folder.write("model.safetensors", "short");
  expect_error(ErrorKind::input, {"model.safetensors", "not a safetensors file"}, open);
  write_shard(folder / "model.safetensors", {"a"});
  EXPECT_NO_THROW(open());
  folder.write("model.safetensors.index.json", "{}");
  expect_error(ErrorKind::input, {"found both"}, open);
  expect_error(ErrorKind::input, {"config.json", "a checkpoint folder", "a file"},
               [&] { Checkpoint::open(folder / "config.json"); });
}

TEST(Checkpoint, IndexRefusals) {
  const TempFolder folder;
  folder.write("config.json", "{}");
  write_shard(folder / "one.safetensors", {"a", "bb"});
  write_shard(folder / "two.safetensors", {"ccc"});
  write_shard(folder / "again.safetensors", {"a"});
  fs::create_directory(folder / "sub");
  write_shard(folder / "sub/three.safetensors", {"dddd"});
  const auto open = [&](const std::string& text) {
    folder.write("model.safetensors.index.json", text);
    return Checkpoint::open(folder.path());
  };
  const Checkpoint good =
      open(index_text(R"({"ccc":"two.safetensors","a":"one.safetensors","bb":"one.safetensors"})"));
  EXPECT_EQ(text_of(good.bytes("ccc")), "ccc");
  EXPECT_EQ(text_of(good.bytes("bb")), "bb");

  struct Case {
    std::string text;
    std::vector<std::string> parts;
  };
  const std::vector<Case> cases = {
      {"", {"index.json", "not valid JSON"}},
      {"[]", {"index.json", "a JSON object"}},
      {"{}", {"index.json", "weight_map", "found nothing"}},
      {index_text("{}"), {"weight_map", "found an empty object"}},
      {index_text("[]"), {"weight_map", "found array"}},
      {index_text(R"({"a":1})"), {"tensor a", "a file name", "found number"}},
      {index_text(R"({"a":"one.safetensors","a":"one.safetensors"})"), {"\"a\" appears twice"}},
      {index_text(R"({"a":"../one.safetensors"})"), {"tensor a", "outside the folder", "../one.safetensors"}},
      {index_text(R"({"a":"/etc/passwd"})"), {"tensor a", "outside the folder", "/etc/passwd"}},
      {index_text(R"({"dddd":"sub/three.safetensors"})"), {"tensor dddd", "a plain file name"}},
      {index_text(R"({"a":".."})"), {"tensor a", "outside the folder"}},
      {index_text(R"({"a":"."})"), {"tensor a", "outside the folder"}},
      {index_text(R"({"a":""})"), {"tensor a", "outside the folder"}},
      {index_text(R"({"a":"one\u0000"})"), {"tensor a", "outside the folder"}},
      {index_text(R"({"a":"gone.safetensors"})"), {"tensor a", "expected gone.safetensors", "no such file"}},
      {index_text(R"({"a":"sub"})"), {"sub", "expected a regular file"}},
      {index_text(R"({"a":"config.json"})"), {"config.json", "not a safetensors file"}},
      {index_text(R"({"a":"one.safetensors"})"), {"one.safetensors", "tensor bb", "not listed"}},
      {index_text(R"({"a":"one.safetensors","bb":"one.safetensors","x":"one.safetensors"})"),
       {"tensor x", "not where the index says", "expected one.safetensors", "no shard"}},
      {index_text(R"({"a":"one.safetensors","bb":"two.safetensors","ccc":"two.safetensors"})"),
       {"tensor bb", "expected two.safetensors", "found one.safetensors"}},
      {index_text(R"({"a":"again.safetensors","bb":"one.safetensors"})"),
       {"tensor a", "in two shards", "again.safetensors", "one.safetensors"}},
  };
  for (const Case& test : cases) {
    SCOPED_TRACE(test.text);
    expect_error(ErrorKind::input, test.parts, [&] { open(test.text); });
  }
}

TEST(Checkpoint, SideFilesTravelAlong) {
  const TempFolder folder;
  for (const char* name :
       {"config.json", "tokenizer.json", "README.md", "pytorch_model.bin", "a.pt", "a.pth", "a.gguf",
        ".hidden", "other.safetensors", "x.index.json", "pytorch_model.bin.index.json", "merges.txt"}) {
    folder.write(name, "x");
  }
  folder.write("blob", "y");
  fs::create_symlink("blob", folder / "linked.json");
  fs::create_symlink("nowhere", folder / "broken.json");
  fs::create_directory(folder / "folder.json");
  write_shard(folder / "model.safetensors", {"a"});
  folder.write("config.json", "{}");
  const Checkpoint checkpoint = Checkpoint::open(folder.path());
  EXPECT_EQ(checkpoint.side_files(),
            (std::vector<fs::path>{folder / "README.md", folder / "blob", folder / "linked.json",
                                   folder / "merges.txt", folder / "tokenizer.json"}));
}

TEST(Checkpoint, SideFilesMayNotBeLinksToElsewhere) {
  const TempFolder folder;
  const fs::path model = folder / "models--a--b";
  const fs::path snapshot = model / "snapshots/1234";
  fs::create_directories(snapshot);
  fs::create_directories(model / "blobs");
  fs::create_directories(folder / "models--a--c/blobs");
  write_shard(snapshot / "model.safetensors", {"a"});
  for (const char* name : {"secret", "models--a--b/refs", "models--a--b/blobs/5678",
                           "models--a--c/blobs/5678", "models--a--b/snapshots/1234/config.json"}) {
    folder.write(name, "{}");
  }
  const auto expect_refused = [&](const fs::path& from, const fs::path& target) {
    fs::create_symlink(target, from / "notes.txt");
    const Checkpoint checkpoint = Checkpoint::open(from);
    expect_error(ErrorKind::input,
                 {(from / "notes.txt").string(), fs::canonical(from / "notes.txt").string(), "outside"},
                 [&] { static_cast<void>(checkpoint.side_files()); });
    EXPECT_EQ(checkpoint.linked_side_files().back(), from / "notes.txt");
    fs::remove(from / "notes.txt");
  };
  for (const char* target :
       {"/etc/passwd", "../../../secret", "../../refs", "../../../models--a--c/blobs/5678"}) {
    expect_refused(snapshot, target);
  }
  // A link to a link, of which only the last leaves the folder.
  fs::create_symlink(folder / "secret", model / "blobs/link");
  expect_refused(snapshot, "../../blobs/link");
  fs::create_symlink("../../blobs/5678", snapshot / "tokenizer.json");
  EXPECT_EQ(Checkpoint::open(snapshot).side_files(), std::vector<fs::path>{snapshot / "tokenizer.json"});
  // However the folder is named.
  fs::create_symlink("models--a--b/snapshots/1234", folder / "named");
  EXPECT_EQ(Checkpoint::open(folder / "named").side_files(),
            std::vector<fs::path>{folder / "named/tokenizer.json"});
  // Elsewhere than in a cache, blobs are nothing special.
  fs::create_directories(folder / "blobs");
  folder.write("blobs/5678", "{}");
  fs::create_directories(folder / "plain/1234");
  fs::copy(snapshot / "config.json", folder / "plain/1234");
  write_shard(folder / "plain/1234/model.safetensors", {"a"});
  expect_refused(folder / "plain/1234", "../../blobs/5678");
}

}  // namespace
}  // namespace relatent
