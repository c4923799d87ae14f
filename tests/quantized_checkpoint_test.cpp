// Files of models whose weights are held in 4 and 8 bits. What bitsandbytes reads and writes is a live test of single
// tensors: peft/quantize_live.py.
#include "support/models.hpp"

#include <lora/lora.hpp>

#include <fstream>

namespace {

using testing::contains;
using testing::distance;
using testing::error_of;
using torch::Tensor;

struct SmallImpl : torch::nn::Module {
  SmallImpl() { to(testing::device()); }
  Tensor forward(const Tensor& ids) { return head(norm(up(tokens(ids)).tanh() * gate(tokens(ids)))); }
  torch::nn::Embedding tokens = register_module("tokens", torch::nn::Embedding(12, 64));
  torch::nn::Linear up = register_module("up", torch::nn::Linear(64, 32));
  torch::nn::Linear gate = register_module("gate", torch::nn::Linear(torch::nn::LinearOptions(64, 32).bias(false)));
  torch::nn::BatchNorm1d norm = register_module("norm", torch::nn::BatchNorm1d(32));
  torch::nn::Linear head = register_module("head", torch::nn::Linear(32, 12));
};
TORCH_MODULE(Small);

Small small(int seed) {
  torch::manual_seed(seed);
  Small model;
  model->eval();
  torch::NoGradGuard no_grad;
  for (auto tensor : {model->norm->weight, model->norm->bias, model->norm->running_mean}) tensor.normal_();
  model->norm->running_var.uniform_(0.5, 2);
  return model;
}

Tensor base_of(Small& model) {
  torch::NoGradGuard no_grad;
  lora::Adapters adapters(*model);
  auto base = adapters.activate("");
  return model->forward(torch::arange(12, testing::device()));
}

struct Scheme {
  const char* name;
  lora::Quantization scheme;
};

const std::vector<Scheme>& schemes() {
  static const std::vector<Scheme> all{{"NF4", lora::NF4()},
                                       {"NF4, scales in float", lora::NF4().block_size(32).double_quantization(false)},
                                       {"FP4", lora::FP4().block_size(128)},
                                       {"int8", lora::Int8()}};
  return all;
}

}  // namespace

TEST_CASE("A model in few bits is written and read as it is, whatever the other one was") {
  const auto& scheme = GENERATE(from_range(schemes()));
  INFO(scheme.name);
  testing::TemporaryFolder folder;
  auto model = small(1);
  const auto written =
      lora::quantize(*model, scheme.scheme, lora::QuantizeOptions().target_modules({"up", "gate", "tokens"}));
  const auto before = base_of(model);
  lora::save_quantized(*model, folder / "model.safetensors");

  const bool other_is_held = GENERATE(false, true);
  auto other = small(2);
  if (other_is_held)  // in another way, and in other places
    lora::quantize(*other, lora::NF4().block_size(256), lora::QuantizeOptions().target_modules({"up", "head"}));
  const auto report = lora::load_quantized(*other, folder / "model.safetensors");
  CHECK(report.layers == std::vector<std::string>{"tokens", "up", "gate"});
  CHECK(report.bytes_after == written.bytes_after);
  CHECK((report.bytes_before == written.bytes_before) == !other_is_held);
  CHECK(torch::equal(base_of(other), before));
  lora::dequantize(*model);
  lora::dequantize(*other);
  const auto numbers = other->named_parameters();
  for (const auto& item : model->named_parameters()) CHECK(torch::equal(item.value(), numbers[item.key()]));
}

TEST_CASE("Weights of which a file has the numbers are held in few bits as they are read") {
  const auto& scheme = GENERATE(from_range(schemes()));
  INFO(scheme.name);
  testing::TemporaryFolder folder;
  auto original = small(1), model = small(2), expected = small(1);
  lora::save_quantized(*original, folder / "model.safetensors");  // of which nothing is
  const auto options = lora::QuantizeOptions().target_modules({"up", "tokens"});
  const auto wanted = lora::quantize(*expected, scheme.scheme, options);
  const auto report = lora::load_quantized(*model, folder / "model.safetensors", scheme.scheme, options);
  CHECK(report.layers == wanted.layers);
  CHECK(report.bytes_before == wanted.bytes_before);
  CHECK(report.bytes_after == wanted.bytes_after);
  CHECK(report.error == testing::Approx(wanted.error));
  CHECK(torch::equal(base_of(model), base_of(expected)));
  CHECK(torch::equal(model->gate->weight, original->gate->weight));

  lora::save_quantized(*model, folder / "held.safetensors");
  auto again = small(3);  // what the file has in few bits stays so; the rest is held as is asked for
  const auto rest = lora::load_quantized(*again, folder / "held.safetensors", lora::Int8());
  CHECK(rest.layers == std::vector<std::string>{"tokens", "up", "gate", "head"});
  testing::Tied tied;
  lora::save_quantized(*tied, folder / "tied.safetensors");
  const auto left = lora::load_quantized(*tied, folder / "tied.safetensors", scheme.scheme);
  CHECK((left.layers.empty() && left.shared == std::vector<std::string>{"head"}));
  const auto named = lora::load_quantized(*tied, folder / "tied.safetensors", lora::NF4(),
                                          lora::QuantizeOptions().target_modules({"head"}));
  CHECK(named.layers.size() == 1);
  CHECK(lora::detail::is_quantized(tied->head->weight));

  const auto before = model->gate->weight.detach().clone();
  {
    torch::NoGradGuard no_grad;
    original->head->weight[0][0] = std::numeric_limits<float>::quiet_NaN();
    original->gate->weight.zero_();
  }
  lora::save_quantized(*original, folder / "broken.safetensors");
  CHECK_THAT(error_of([&] { lora::load_quantized(*model, folder / "broken.safetensors", scheme.scheme); }),
             contains("not finite"));
  CHECK(torch::equal(model->gate->weight, before));
}

TEST_CASE("Weights in 12 bits are written as the numbers of bfloat16 that they are") {
  testing::TemporaryFolder folder;
  auto model = small(1);
  for (auto& parameter : model->parameters()) parameter.set_data(parameter.to(torch::kBFloat16).to(torch::kFloat));
  const auto options = lora::QuantizeOptions().target_modules({"up", "tokens"});
  const auto written = lora::quantize(*model, lora::Lossless(), options);
  CHECK(written.error == 0);
  lora::save_quantized(*model, folder / "model.safetensors");
  const auto tensors = lora::read_safetensors(folder / "model.safetensors");
  CHECK(tensors.at("up.weight").scalar_type() == torch::kBFloat16);
  CHECK(tensors.at("gate.weight").scalar_type() == torch::kFloat);
  auto numbers = small(2), held = small(3);
  lora::load_quantized(*numbers, folder / "model.safetensors");
  const auto report = lora::load_quantized(*held, folder / "model.safetensors", lora::Lossless(), options);
  CHECK(report.bytes_after == written.bytes_after);
  CHECK(torch::equal(base_of(held), base_of(model)));
  lora::dequantize(*model);
  CHECK(torch::equal(numbers->up->weight, model->up->weight));
  CHECK(torch::equal(numbers->tokens->weight, model->tokens->weight));
}

TEST_CASE("A model that is split over several files is read by its index") {
  testing::TemporaryFolder folder;
  auto written = small(1), model = small(2);
  lora::quantize(*written, lora::NF4(), lora::QuantizeOptions().target_modules({"up"}));
  lora::save_quantized(*written, folder / "all.safetensors");
  std::map<std::string, std::map<std::string, Tensor>> files;
  std::string map;
  for (const auto& [name, tensor] : lora::read_safetensors(folder / "all.safetensors")) {
    const std::string file = name.rfind("up.", 0) == 0 ? "1.safetensors" : "2.safetensors";
    files[file].emplace(name, tensor);
    map += (map.empty() ? "\"" : ", \"") + name + "\": \"" + file + "\"";
  }
  for (const auto& [file, tensors] : files) lora::write_safetensors(folder / file, tensors);
  const auto index = folder / "model.safetensors.index.json";
  std::ofstream(index) << "{\"weight_map\": {" << map << "}}";
  CHECK(lora::load_quantized(*model, index).layers == std::vector<std::string>{"up"});
  CHECK(torch::equal(base_of(model), base_of(written)));
}

TEST_CASE("What is tied is in the file once, and stays tied") {
  testing::TemporaryFolder folder;
  testing::Tied model;
  lora::quantize(*model, lora::NF4().block_size(32), lora::QuantizeOptions().target_modules({"head"}));
  lora::save_quantized(*model, folder / "model.safetensors");
  const auto file = lora::read_safetensors(folder / "model.safetensors");
  CHECK(file.count("tokens.weight") + file.count("head.weight") == 1);
  testing::Tied other;
  lora::load_quantized(*other, folder / "model.safetensors");
  const auto base = [](testing::Tied& of) {
    lora::Adapters none(*of);
    auto active = none.activate("");
    return of->forward(torch::arange(10, testing::device()));
  };
  CHECK(torch::equal(base(other), base(model)));
  CHECK(lora::detail::is_quantized(other->head->weight));
  CHECK(other->head->weight.is_same(other->tokens->weight));
}

TEST_CASE("A file that does not fit is an error that names what is wrong, and changes nothing") {
  testing::TemporaryFolder folder;
  auto model = small(1);
  const auto before = base_of(model);
  auto written = small(2);
  lora::quantize(*written, lora::NF4(), lora::QuantizeOptions().target_modules({"up"}));
  lora::save_quantized(*written, folder / "model.safetensors");
  auto tensors = lora::read_safetensors(folder / "model.safetensors");
  struct Row {
    std::function<void(std::map<std::string, Tensor>&)> spoil;
    std::vector<std::string> text;
  };
  const std::vector<Row> rows{
      {[](auto& all) { all.erase("gate.weight"); }, {"no tensors for", "gate.weight"}},
      {[](auto& all) { all["gate.scale"] = torch::ones({2}); }, {"does not have", "gate.scale"}},
      {[](auto& all) {
         all["gate.weight"] = torch::ones({3, 2});
       },
       {"gate.weight", "[3, 2]", "[32, 64]"}},
      {[](auto& all) {
         all["gate.weight"] = torch::ones({32, 64}, torch::kLong);
       },
       {"gate.weight", "Long"}},
      {[](auto& all) { all.erase("up.weight.absmax"); }, {"up.weight.absmax", "missing"}},
      {[](auto& all) {
         all["up.weight"] = torch::ones({5, 1}, torch::kByte);
       },
       {"up.weight", "fit 5 bytes"}},
  };
  for (size_t i = 0; i < rows.size(); ++i) {
    CAPTURE(i);
    auto spoiled = tensors;
    rows[i].spoil(spoiled);
    lora::write_safetensors(folder / "spoiled.safetensors", spoiled);
    const auto error = error_of([&] { lora::load_quantized(*model, folder / "spoiled.safetensors"); });
    for (const auto& part : rows[i].text) CHECK_THAT(error, contains(part));
    CHECK(torch::equal(base_of(model), before));
  }
  CHECK_THAT(error_of([&] { lora::load_quantized(*model, folder / "none.safetensors"); }),
             contains("none.safetensors"));
  written->to(torch::kDouble);
  CHECK_THAT(error_of([&] { lora::save_quantized(*written, folder / "double.safetensors"); }), contains("Double"));
}
