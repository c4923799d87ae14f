#include "support/testing.hpp"

#include <lora/files/safetensors.hpp>

#include <csignal>
#include <cstring>
#include <fstream>
#include <iterator>

#include <sys/resource.h>
#include <sys/stat.h>

namespace {

using lora::CheckpointError;
using lora::read_safetensors;
using lora::TensorInfo;
using lora::write_safetensors;
using testing::contains;

std::string read_bytes(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

void write_bytes(const std::filesystem::path& path, const std::string& bytes) {
  std::ofstream(path, std::ios::binary) << bytes;
}

/// The eight bytes of a length, the header, and the data.
std::string file_of(const std::string& header, const std::string& data = "") {
  const uint64_t length = header.size();
  std::string prefix(sizeof(length), '\0');
  std::memcpy(prefix.data(), &length, sizeof(length));
  return prefix + header + data;
}

/// LibTorch has F8_E8M0 from 2.7 and F4 from 2.8 on.
bool has_float4() { return lora::detail::kFloat4<at::ScalarType> != at::ScalarType::Undefined; }
bool has_exponent() { return lora::detail::kFloat8Exponent<at::ScalarType> != at::ScalarType::Undefined; }

size_t files_in(const std::filesystem::path& folder) {
  return std::distance(std::filesystem::directory_iterator(folder), std::filesystem::directory_iterator());
}

/// A tensor of any type with distinct bytes; made of bytes because not every type has arithmetic.
torch::Tensor numbered(torch::ScalarType dtype, int64_t rows) {
  const auto width = 2 * static_cast<int64_t>(c10::elementSize(dtype));
  if (dtype == torch::kBool) return torch::arange(2 * rows).remainder(2).to(torch::kBool).view({rows, 2});
  return torch::arange(rows * width).to(torch::kByte).view({rows, width}).view(dtype);
}

bool same_bytes(const torch::Tensor& a, const torch::Tensor& b) {
  return a.dtype() == b.dtype() && a.sizes() == b.sizes() && a.is_contiguous() && b.is_contiguous() &&
         (a.nbytes() == 0 || std::memcmp(a.const_data_ptr(), b.const_data_ptr(), a.nbytes()) == 0);
}

}  // namespace

TEST_CASE("write_safetensors writes the bytes of the Python package", "[safetensors]") {
  testing::TemporaryFolder folder;
  // safetensors.torch.save_file({"b": ..., "a": ..., "w": ...}, path, metadata={"format": "pt"}) of version 0.8.0
  write_safetensors(folder / "x", {{"b", torch::tensor({1.5F, -2.0F})},
                                   {"a", torch::tensor(0.25F)},
                                   {"w", torch::tensor({{1, 2, 3}}, torch::kLong)}});
  const char expected[] =
      "\xc8\x00\x00\x00\x00\x00\x00\x00"
      "{\"__metadata__\":{\"format\":\"pt\"},\"w\":{\"dtype\":\"I64\",\"shape\":[1,3],\"data_offsets\":[0,24]},"
      "\"a\":{\"dtype\":\"F32\",\"shape\":[],\"data_offsets\":[24,28]},"
      "\"b\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[28,36]}}   "
      "\x01\x00\x00\x00\x00\x00\x00\x00\x02\x00\x00\x00\x00\x00\x00\x00\x03\x00\x00\x00\x00\x00\x00\x00"
      "\x00\x00\x80\x3e"
      "\x00\x00\xc0\x3f\x00\x00\x00\xc0";
  CHECK(read_bytes(folder / "x") == std::string(expected, sizeof(expected) - 1));

  write_safetensors(folder / "empty", {}, {});
  CHECK(read_bytes(folder / "empty") == file_of("{}      "));
}

TEST_CASE("every type of the format survives a file", "[safetensors]") {
  testing::TemporaryFolder folder;
  std::map<std::string, torch::Tensor> tensors;
  for (const auto& type : lora::detail::kSafetensorsTypes) {
    if (type.dtype != torch::ScalarType::Undefined) tensors[std::string(type.name)] = numbered(type.dtype, 3);
  }
  REQUIRE(tensors.size() == 18U + (has_exponent() ? 1U : 0U) + (has_float4() ? 1U : 0U));
  tensors["nan"] = torch::tensor({std::nanf(""), INFINITY, -0.0F});
  tensors["scalar"] = torch::tensor(-3.5);
  tensors["empty"] = torch::zeros({2, 0, 3}, torch::kHalf);
  tensors["quote \" slash / tab \t \xc3\xa9"] = torch::ones({1});
  write_safetensors(folder / "all", tensors, {{"format", "pt"}, {"rank", "4"}});

  const auto content = lora::open_safetensors(folder / "all");
  CHECK(content.metadata == std::map<std::string, std::string>{{"format", "pt"}, {"rank", "4"}});
  REQUIRE(content.tensors.size() == tensors.size());
  for (const auto& [name, tensor] : tensors) {
    INFO(name);
    CHECK(same_bytes(content.tensors.at(name), tensor));
  }
  if (has_float4()) {
    CHECK(contains("\"F4\",\"shape\":[3,4]").match(read_bytes(folder / "all")));  // two values in each element
  }
}

TEST_CASE("read_safetensors maps the file", "[safetensors]") {
  testing::TemporaryFolder folder;
  const auto path = folder / "x";
  write_safetensors(path, {{"w", torch::arange(6.0).view({2, 3})}, {"v", torch::ones({4})}});
  const auto before = read_bytes(path);
  auto tensors = read_safetensors(path);
  auto w = tensors.at("w"), v = tensors.at("v");
  tensors.clear();

  SECTION("the values stay where they are, one after the other") {
    // "v" comes first: 4 floats
    CHECK(static_cast<char*>(w.data_ptr()) - static_cast<char*>(v.data_ptr()) == 4 * sizeof(float));
    CHECK(w.storage().data_ptr().get() == w.data_ptr());
  }
  SECTION("a change in place does not reach the file") {
    w.mul_(2);
    CHECK(w[1][2].item<float>() == 10);
    CHECK(read_bytes(path) == before);
    CHECK(read_safetensors(path).at("w")[1][2].item<float>() == 5);
  }
  SECTION("the file may be replaced by what was read from it") {
    write_safetensors(path, {{"w", w.mul(3)}});
    CHECK(w[1][2].item<float>() == 5);
    CHECK(read_safetensors(path).at("w")[1][2].item<float>() == 15);
  }
  SECTION("one tensor keeps the mapping alive") {
    v.reset();
    CHECK(w.sum().item<float>() == 15);
  }
}

TEST_CASE("values that are not aligned are copied", "[safetensors]") {
  testing::TemporaryFolder folder;
  const float values[] = {1.5F, -2.5F};
  const std::string bytes(reinterpret_cast<const char*>(values), sizeof(values));
  std::string header = R"({"b":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},)"
                       R"("w":{"dtype":"F32","shape":[2],"data_offsets":[1,9]}})";
  header.resize((header.size() + 7) / 8 * 8, ' ');
  write_bytes(folder / "x", file_of(header, "\x07" + bytes));
  const auto tensors = read_safetensors(folder / "x");
  CHECK(reinterpret_cast<uintptr_t>(tensors.at("w").data_ptr()) % sizeof(float) == 0);
  CHECK(torch::equal(tensors.at("w"), torch::tensor({1.5F, -2.5F})));
  CHECK(tensors.at("b").item<int>() == 7);
}

TEST_CASE("SafetensorsReader reads one tensor at a time into memory of its own", "[safetensors]") {
  testing::TemporaryFolder folder;
  const auto path = folder / "x", other = folder / "y", index = folder / "index.json";
  const std::map<std::string, torch::Tensor> written{{"v", torch::arange(6.0).view({2, 3})},
                                                     {"w", torch::ones({4}, torch::kBFloat16)},
                                                     {"none", torch::empty({0, 5})}};
  write_safetensors(path, written);
  write_safetensors(other, {{"z", torch::full({2}, 3, torch::kLong)}, {"unlisted", torch::ones({1})}});
  write_bytes(index, R"({"weight_map":{"v":"x","w":"x","z":"y"}})");

  SECTION("of one file") {
    const lora::SafetensorsReader reader(path);
    std::vector<std::string> names;
    for (const auto& info : reader.tensors()) names.push_back(info.name);
    CHECK(names == std::vector<std::string>{"none", "v", "w"});
    for (const auto& [name, tensor] : written) CHECK(same_bytes(reader.read(name), tensor));
    CHECK(reader.read("v").storage().resizable());  // no part of a mapping
    CHECK_THROWS_WITH(reader.read("u"), contains("x: has no tensor \"u\""));
    std::filesystem::resize_file(path, std::filesystem::file_size(path) - 1);
    CHECK_THROWS_WITH(reader.read("w"), contains("x: tensor \"w\" cannot be read: Input/output error"));
    CHECK_THROWS_WITH(lora::SafetensorsReader(path), contains("x: is cut short"));
  }
  SECTION("of several") {
    const auto reader = lora::SafetensorsReader::of_index(index);
    CHECK(reader.tensors().size() == 3);
    CHECK(reader.read("z")[1].item<int>() == 3);
    CHECK(same_bytes(reader.read("w"), written.at("w")));
    CHECK_THROWS_WITH(reader.read("unlisted"), contains("has no tensor \"unlisted\""));
    write_bytes(index, R"({"weight_map":{"v":"y"}})");
    CHECK_THROWS_WITH(lora::SafetensorsReader::of_index(index), contains("y: has no tensor \"v\", which "));
  }
}

TEST_CASE("tensors are written whatever their strides and graph", "[safetensors]") {
  testing::TemporaryFolder folder;
  const auto w = torch::arange(6.0).view({2, 3}).to(testing::device()).requires_grad_();
  const auto c = torch::complex(torch::tensor({1.0F, 2.0F}), torch::tensor({3.0F, -4.0F}));
  write_safetensors(folder / "x", {{"t", w.t()}, {"row", w[1]}, {"e", w[0].sum().expand({3})}, {"c", c.conj()}});
  const auto tensors = read_safetensors(folder / "x");
  CHECK(torch::equal(tensors.at("t"), torch::tensor({{0.0F, 3.0F}, {1.0F, 4.0F}, {2.0F, 5.0F}})));
  CHECK(torch::equal(tensors.at("row"), torch::tensor({3.0F, 4.0F, 5.0F})));
  CHECK(torch::equal(tensors.at("e"), torch::tensor({3.0F, 3.0F, 3.0F})));
  CHECK(torch::view_as_real(tensors.at("c"))[1][1].item<float>() == 4);
  CHECK(!tensors.at("t").requires_grad());
}

TEST_CASE("SafetensorsWriter takes the tensors in any order and replaces the target at the end", "[safetensors]") {
  testing::TemporaryFolder folder;
  const std::map<std::string, torch::Tensor> tensors{{"a", torch::ones({2, 2})}, {"b", torch::arange(3)}};
  write_safetensors(folder / "expected", tensors);
  write_bytes(folder / "x", "old");
  const std::vector<TensorInfo> infos{{"a", torch::kFloat, {2, 2}}, {"b", torch::kLong, {3}}};
  {
    lora::SafetensorsWriter writer(folder / "x", infos);
    writer.write("a", tensors.at("a"));
    CHECK_THROWS_WITH(writer.finish(), contains("1 tensors were not written, \"b\" among them"));
    writer.write("b", tensors.at("b"));
    CHECK(read_bytes(folder / "x") == "old");
    CHECK(files_in(folder.path()) == 3);
    writer.finish();
  }
  CHECK(read_bytes(folder / "x") == read_bytes(folder / "expected"));
  CHECK(files_in(folder.path()) == 2);
  struct stat status {};
  ::stat((folder / "x").c_str(), &status);
  const auto mask = ::umask(0);
  ::umask(mask);
  CHECK((status.st_mode & 0777) == (0666 & ~mask));  // as any other file, not private like most temporary ones
}

TEST_CASE("SafetensorsWriter that does not finish leaves the folder as it was", "[safetensors]") {
  testing::TemporaryFolder folder;
  write_bytes(folder / "x", "old");
  const std::vector<TensorInfo> infos{{"a", torch::kFloat, {2, 2}}};
  SECTION("not finished") { lora::SafetensorsWriter(folder / "x", infos).write("a", torch::ones({2, 2})); }
  SECTION("wrong shape") {
    lora::SafetensorsWriter writer(folder / "x", infos);
    CHECK_THROWS_WITH(writer.write("a", torch::ones({2, 3})),
                      contains("x: tensor \"a\" was announced as Float [2, 2], but is Strided Float [2, 3]"));
  }
  SECTION("wrong type") {
    lora::SafetensorsWriter writer(folder / "x", infos);
    CHECK_THROWS_WITH(writer.write("a", torch::ones({2, 2}, torch::kHalf)), contains("but is Strided Half [2, 2]"));
  }
  SECTION("sparse") {
    lora::SafetensorsWriter writer(folder / "x", infos);
    CHECK_THROWS_WITH(writer.write("a", torch::eye(2).to_sparse()), contains("but is Sparse Float"));
  }
  SECTION("twice or never announced") {
    lora::SafetensorsWriter writer(folder / "x", infos);
    writer.write("a", torch::ones({2, 2}));
    CHECK_THROWS_WITH(writer.write("a", torch::ones({2, 2})), contains("\"a\" was not announced, or is written twice"));
  }
  SECTION("a name taken") {
    CHECK_THROWS_WITH(lora::SafetensorsWriter(folder / "x", {infos[0], infos[0]}), contains("\"a\" is taken already"));
    CHECK_THROWS_WITH(write_safetensors(folder / "x", {{"__metadata__", torch::ones({1})}}), contains("taken already"));
  }
  SECTION("what the format cannot hold") {
    CHECK_THROWS_WITH(write_safetensors(folder / "x", {{"z", torch::ones({1}, torch::kComplexDouble)}}),
                      contains("tensor \"z\" is ComplexDouble, which safetensors cannot hold"));
    CHECK_THROWS_WITH(write_safetensors(folder / "x", {{"\xff", torch::ones({1})}}), contains("valid UTF-8"));
    CHECK_THROWS_WITH(write_safetensors(folder / "x", {{"u", torch::Tensor()}}), contains("\"u\" is undefined"));
    CHECK_THROWS_WITH(lora::SafetensorsWriter(folder / "x", {{"n", torch::kFloat, {-1}}}), contains("too large"));
  }
  CHECK(read_bytes(folder / "x") == "old");
  CHECK(files_in(folder.path()) == 1);
}

TEST_CASE("files that the operating system refuses are named with the reason", "[safetensors]") {
  testing::TemporaryFolder folder;
  const std::map<std::string, torch::Tensor> tensors{{"a", torch::ones({64, 1024})}};
  CHECK_THROWS_WITH(read_safetensors(folder / "none"), contains("none: cannot be opened: No such file or directory"));
  CHECK_THROWS_WITH(read_safetensors(folder.path()), contains("is not a regular file"));
  CHECK_THROWS_WITH(write_safetensors(folder / "no" / "x", tensors), contains("cannot be created: No such file"));
  std::filesystem::create_directories(folder / "folder");
  CHECK_THROWS_WITH(write_safetensors(folder / "folder", tensors), contains("cannot be replaced: Is a directory"));
  REQUIRE(::mkfifo((folder / "pipe").c_str(), 0600) == 0);
  CHECK_THROWS_WITH(read_safetensors(folder / "pipe"), contains("is not a regular file"));
  CHECK(files_in(folder.path()) == 2);

  // A file size limit stands for a full disk; the signal that comes with it would end the process.
  const auto ignored = std::signal(SIGXFSZ, SIG_IGN);
  struct rlimit old {};
  ::getrlimit(RLIMIT_FSIZE, &old);
  const struct rlimit small { 4096, old.rlim_max };
  ::setrlimit(RLIMIT_FSIZE, &small);
  const auto error = testing::error_of([&] { write_safetensors(folder / "x", tensors); });
  ::setrlimit(RLIMIT_FSIZE, &old);
  std::signal(SIGXFSZ, ignored);
  CHECK(error == (folder / "x").string() + ": cannot be written: File too large");
  CHECK(files_in(folder.path()) == 2);
}

TEST_CASE("damaged files are refused with what is wrong in them", "[safetensors]") {
  testing::TemporaryFolder folder;
  const auto path = folder / "bad.safetensors";
  const std::string w = R"("w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]})";
  const std::string eight(8, '\1');
  const auto entry = [](const std::string& text) { return file_of("{\"w\":" + text + "}", "\1\1\1\1\1\1\1\1"); };

  const std::vector<std::pair<std::string, std::string>> cases{
      {"", "is cut short: 0 bytes"},
      {"1234567", "is cut short: 7 bytes"},
      {std::string("\x10\0\0\0\0\0\0\0{}", 10), "the header is 16 bytes long, but only 2 bytes follow"},
      {std::string("\xff\xff\xff\xff\xff\xff\xff\xff{}", 10), "18446744073709551615 bytes long"},
      {std::string("\x01\xe1\xf5\x05\0\0\0\0{}", 10), "100000001 bytes long, and at most 100000000"},
      {file_of(""), "has to start with '{'"},
      {file_of("\xef\xbb\xbf{}"), "has to start with '{'"},
      {file_of("[]"), "has to start with '{'"},
      {file_of("{"), "is not valid JSON: parse error at line 1, column 2"},
      {file_of("{\"\xff\":1}"), "is not valid JSON"},
      {file_of("{} {}"), "is not valid JSON"},
      {file_of("{" + w + "}" + std::string("\0x", 2), eight), "contains a zero byte"},
      {file_of("{\"a\":{\"x\":" + std::string(100000, '[')), "nested more than 127 deep"},
      {entry(R"({"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]})"),
       "tensor \"w\": the key \"dtype\" appears twice"},
      {entry(R"({"dtype":{"F32":null,"F32":null},"shape":[2],"data_offsets":[0,8]})"), "the key \"F32\" appears twice"},
      {file_of(R"({"__metadata__":{},"__metadata__":{}})"), "__metadata__ appears twice"},
      {file_of("{\"w\":1," + w + "}", eight), "tensor \"w\" has to be an object, but is number"},
      {entry(R"(["F32",[2],[0,8],1])"), "has to be a list of 3, but is one of 4"},
      {file_of(R"({"__metadata__":{"a":1}})"), "__metadata__ has to hold strings, but \"a\" is number"},
      {file_of(R"({"__metadata__":["a"]})"), "__metadata__ has to be an object, but is array"},
      {entry("3"), "tensor \"w\" has to be an object, but is number"},
      {entry(R"({"shape":[2],"data_offsets":[0,8]})"), "tensor \"w\" has no dtype"},
      {entry(R"({"dtype":"F32","data_offsets":[0,8]})"), "tensor \"w\" has no shape"},
      {entry(R"({"dtype":"F32","shape":[2]})"), "tensor \"w\" has no data_offsets"},
      {entry(R"({"dtype":"F33","shape":[2],"data_offsets":[0,8]})"), "unknown dtype \"F33\""},
      {entry(R"({"dtype":"f32","shape":[2],"data_offsets":[0,8]})"), "unknown dtype \"f32\""},
      {entry(R"({"dtype":"F6_E2M3","shape":[4],"data_offsets":[0,3]})"), "is F6_E2M3, which LibTorch does not have"},
      {entry(R"({"dtype":7,"shape":[2],"data_offsets":[0,8]})"), "dtype has to be a string, but is number"},
      {entry(R"({"dtype":["F32"],"shape":[2],"data_offsets":[0,8]})"), "dtype has to be a string, but is array"},
      {entry(R"({"dtype":{"F32":1},"shape":[2],"data_offsets":[0,8]})"), "dtype has to be a string, but is object"},
      {entry(R"({"dtype":{"F32":null,"U8":null},"shape":[2],"data_offsets":[0,8]})"), "but is object"},
      {entry(R"({"dtype":{},"shape":[2],"data_offsets":[0,8]})"), "unknown dtype \"\""},
      {entry(R"({"dtype":"F32","shape":2,"data_offsets":[0,8]})"), "shape has to be a list of numbers"},
      {entry(R"({"dtype":"F32","shape":"2","data_offsets":[0,8]})"), "from 0 to 2^64 - 1, but is 2"},
      {entry(R"({"dtype":"F32","shape":{"2":2},"data_offsets":[0,8]})"), "but is object"},
      {entry(R"({"dtype":"F32","shape":[")" + std::string(1000, 'x') + R"("],"data_offsets":[0,8]})"),
       "but holds " + std::string(80, 'x')},
      {entry(R"({"dtype":"F32","shape":[[2]],"data_offsets":[0,8]})"), "but holds array"},
      {entry(R"({"dtype":"F32","shape":[2],"data_offsets":[null,8]})"), "data_offsets has to be a list of numbers"},
      {entry(R"(["F32",[2]])"), "has to be a list of 3, but is one of 2"},
      {entry(R"([[2],"F32",[0,8]])"), "dtype has to be a string, but is array"},
      {entry(R"({"dtype":"F32","shape":[-2],"data_offsets":[0,8]})"), "but holds -2"},
      {entry(R"({"dtype":"F32","shape":[2.0],"data_offsets":[0,8]})"), "but holds 2.0"},
      {entry(R"({"dtype":"F32","shape":[9223372036854775808],"data_offsets":[0,8]})"),
       "[9223372036854775808] is too large"},
      {entry(R"({"dtype":"F32","shape":[18446744073709551616],"data_offsets":[0,8]})"),
       "but holds 18446744073709551616"},
      {entry(R"({"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,0]})"), "is too large"},
      {entry(R"({"dtype":"F32","shape":[0,4294967296,4294967296],"data_offsets":[0,0]})"), "is too large"},
      {entry(R"({"dtype":"F64","shape":[2305843009213693952],"data_offsets":[0,8]})"), "is too large"},
      {entry(R"({"dtype":"F32","shape":[3],"data_offsets":[0,8]})"),
       "shape [3] of F32 needs 12 bytes, but data_offsets are 0 and 8"},
      {entry(R"({"dtype":"F32","shape":[1],"data_offsets":[0,8]})"), "needs 4 bytes"},
      {entry(R"({"dtype":"F32","shape":[2],"data_offsets":[8,0]})"), "data_offsets are 8 and 0"},
      {entry(R"({"dtype":"F32","shape":[2],"data_offsets":[0]})"), "has to hold 2 numbers, but holds 1"},
      {entry(R"({"dtype":"F4","shape":[15],"data_offsets":[0,8]})"), "a multiple of 2, but has shape [15]"},
      {entry(R"({"dtype":"F4","shape":[],"data_offsets":[0,8]})"), "a multiple of 2"},
      {file_of("{" + w + "}", eight.substr(1)),
       "is cut short: the tensors need 8 bytes after the header, but 7 are there"},
      {file_of("{" + w + "}", eight + "x"), "has 1 bytes after the last tensor"},
      {file_of("{}", "x"), "has 1 bytes after the last tensor"},
      {entry(R"({"dtype":"U8","shape":[7],"data_offsets":[1,8]})"),
       "starts at byte 1, which leaves a hole after byte 0"},
      {entry(R"({"dtype":"U8","shape":[4],"data_offsets":[0,4]},"v":{"dtype":"U8","shape":[5],"data_offsets":[3,8]})"),
       "tensor \"v\" starts at byte 3, which overlaps with the one up to byte 4"},
      {entry(R"({"dtype":"U8","shape":[4],"data_offsets":[0,4]},"v":{"dtype":"U8","shape":[3],"data_offsets":[5,8]})"),
       "tensor \"v\" starts at byte 5, which leaves a hole after byte 4"},
  };
  for (const auto& [bytes, expected] : cases) {
    write_bytes(path, bytes);
    INFO(expected);
    CHECK_THROWS_AS(read_safetensors(path), CheckpointError);
    const auto error = testing::error_of([&] { read_safetensors(path); });
    const bool is_missing = !has_float4() && expected.find("a multiple of 2") == 0;
    CHECK_THAT(error, contains(is_missing ? "is F4, which LibTorch does not have" : expected));
    CHECK(error.rfind(path.string() + ": ", 0) == 0);
    CHECK(error.size() < path.string().size() + 250);  // however long the text is that is wrong
  }

  // and the same file undamaged is read
  write_bytes(path, file_of("{" + w + "}", eight));
  CHECK(read_safetensors(path).at("w").sizes() == torch::IntArrayRef({2}));
}

TEST_CASE("what the Python package reads is read, also where the format's description is stricter", "[safetensors]") {
  testing::TemporaryFolder folder;
  const auto path = folder / "odd";
  const std::string w = R"("w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]})";
  const float values[] = {1.5F, -2.5F};
  const std::string bytes(reinterpret_cast<const char*>(values), sizeof(values));
  for (const auto& header : {
           "{" + w + "}",
           " \t\r\n{" + w + "}",
           R"({"__metadata__":null,)" + w + "}",
           R"({"w":{"dtype":"F6_E2M3","shape":[7,9223372036854775808],"data_offsets":[3,1]},)" + w + "}",
           std::string(R"({"w":["F32",[2],[0,8]]})"),
           std::string(R"({"w":{"data_offsets":[0,8],"dtype":{"F32":null},"shape":[2],"x":[{"a":1,"a":2},-1.5]}})"),
           R"({"":["U8",[0,9223372036854775807],[8,8]],)" + w + "}",
       }) {
    INFO(header);
    write_bytes(path, file_of(header, bytes));
    CHECK(torch::equal(read_safetensors(path).at("w"), torch::tensor({1.5F, -2.5F})));
  }
  write_bytes(path, file_of(R"({"__metadata__":{"a":"b","a":"c"}})"));
  CHECK(lora::open_safetensors(path).metadata == std::map<std::string, std::string>{{"a", "c"}});
}

TEST_CASE("read_safetensors_index puts a sharded model together", "[safetensors]") {
  testing::TemporaryFolder folder;
  const auto index = folder / "model.safetensors.index.json";
  write_safetensors(folder / "1.safetensors", {{"a", torch::full({2}, 1.0)}, {"b", torch::full({2}, 2.0)}});
  write_safetensors(folder / "2.safetensors", {{"c", torch::full({3}, 3.0)}, {"unlisted", torch::ones({1})}});
  const auto map = [&](const std::string& text) {
    write_bytes(index, "{\"metadata\":{},\"weight_map\":" + text + "}");
  };

  map(R"({"a":"1.safetensors","b":"1.safetensors","c":"2.safetensors"})");
  const auto tensors = lora::read_safetensors_index(index);
  REQUIRE(tensors.size() == 3);
  CHECK(tensors.at("b")[1].item<float>() == 2);
  CHECK(tensors.at("c")[2].item<float>() == 3);

  const auto error = [&](const std::string& text) {
    map(text);
    return testing::error_of([&] { lora::read_safetensors_index(index); });
  };
  CHECK(error(R"({"a":"2.safetensors"})") ==
        (folder / "2.safetensors").string() + ": has no tensor \"a\", which " + index.string() + " says it has");
  CHECK_THAT(error(R"({"a":"3.safetensors"})"), contains("3.safetensors: cannot be opened"));
  CHECK_THAT(error(R"({"a":"../x"})"), contains("lies outside of this folder, in \"../x\""));
  CHECK_THAT(error(R"({"a":"/etc/passwd"})"), contains("lies outside of this folder"));
  CHECK_THAT(error(R"({"a":1})"), contains("tensor \"a\" has no file name, but 1"));
  CHECK_THAT(error(R"({"a":"1.safetensors","a":"2.safetensors"})"), contains("the key \"a\" appears twice"));
  CHECK_THAT(error("[]"), contains("has to hold an object \"weight_map\""));
}
