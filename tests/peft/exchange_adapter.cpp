// usage: exchange_adapter JOBS.json
// Every job builds a model from its description (exchange_model.py), fills it from a file, gives it an adapter, and
// writes what the model computes. Prints for each job an empty line, or in one line why it could not be done.
//   model    the description
//   tensors  file of the model's tensors, the "input", and the "target" of training
//   adapter  folder to load, with `options` of lora::LoadOptions that are to be true, or
//   trained  folder to make the former from, with `start`
//   config   file to attach, with random values; `fused` its parts of fused projections; `second` file of one more
//   steps    of training, with the rate `lr`
//   save     folder for the adapters
//   output   file for what is computed with the adapter that comes last
#include <torch/torch.h>

#include <fstream>
#include <iostream>
#include <lora/lora.hpp>
#include <map>
#include <nlohmann/json.hpp>

using nlohmann::json;
using torch::Tensor;
using Layer = std::function<Tensor(const Tensor&)>;

/// A module that is nothing but the parent of others.
struct Node : torch::nn::Module {
  template <class Holder>
  Holder place(const std::string& name, Holder module) {
    const auto dot = name.find('.');
    if (dot == std::string::npos) return register_module(name, module);
    const auto head = name.substr(0, dot);
    auto child = named_children().contains(head) ? std::dynamic_pointer_cast<Node>(named_children()[head])
                                                 : register_module(head, std::make_shared<Node>());
    return child->place(name.substr(dot + 1), module);
  }
};

struct ExpertsImpl : torch::nn::Module {
  ExpertsImpl(int64_t experts, int64_t width, int64_t hidden)
      : gate_up(register_parameter("gate_up", torch::empty({experts, hidden, width}))),
        down(register_parameter("down", torch::empty({experts, width, hidden}))),
        mix(register_parameter("mix", torch::empty({width, width}))) {}

  Tensor forward(const Tensor& x) {
    const auto hidden = torch::matmul(x.unsqueeze(1), gate_up.transpose(1, 2)).tanh();
    return torch::nn::functional::linear(torch::matmul(hidden, down.transpose(1, 2)).mean(1), mix);
  }

  Tensor gate_up, down, mix;
};
TORCH_MODULE(Experts);

/// Plain attention of (batch, length, width) with keys and values that may have fewer heads.
Tensor attend(const Tensor& q, const Tensor& k, const Tensor& v, int64_t heads) {
  const auto split = [&](const Tensor& x) {
    const auto parts = x.unflatten(-1, {-1, q.size(-1) / heads}).transpose(1, 2);
    return parts.repeat_interleave(heads / parts.size(1), 1);
  };
  return torch::scaled_dot_product_attention(split(q), split(k), split(v)).transpose(1, 2).flatten(2);
}

class Net : public Node {
 public:
  explicit Net(const json& description) {
    for (const auto& layer : description) layers_.push_back(make(layer));
  }

  /// Takes over the tensors of the Python model.
  void fill(const std::map<std::string, Tensor>& tensors) {
    torch::NoGradGuard no_grad;
    auto own = named_parameters();
    for (auto& item : own) {
      const auto& stored = tensors.at("model." + item.key());
      item.value().copy_(transposed_.count(item.key()) > 0 ? stored.t() : stored);
    }
    for (auto& item : named_buffers()) item.value().copy_(tensors.at("model." + item.key()));
  }

  Tensor forward(Tensor x) {
    for (size_t i = 0; i + 1 < layers_.size(); ++i) x = layers_[i](x).tanh();
    return layers_.back()(x);
  }

 private:
  Layer make(const json& layer) {
    const auto kind = layer.at("kind").get<std::string>(), name = layer.at("name").get<std::string>();
    const auto sizes = layer.at("sizes").get<std::vector<int64_t>>();
    if (kind == "Linear" || kind == "Conv1D") return linear(name, layer, sizes[0], sizes[1], kind == "Conv1D");
    if (kind == "Embedding") return embedding(name, layer, sizes);
    if (kind == "Conv1d") return convolution<1, torch::nn::Conv1d>(name, layer, sizes);
    if (kind == "Conv2d") return convolution<2, torch::nn::Conv2d>(name, layer, sizes);
    if (kind == "Conv3d") return convolution<3, torch::nn::Conv3d>(name, layer, sizes);
    if (kind == "BatchNorm1d") return placed(name, torch::nn::BatchNorm1d(sizes[0]));
    if (kind == "BatchNorm2d") return placed(name, torch::nn::BatchNorm2d(sizes[0]));
    if (kind == "BatchNorm3d") return placed(name, torch::nn::BatchNorm3d(sizes[0]));
    if (kind == "LayerNorm") return placed(name, torch::nn::LayerNorm(torch::nn::LayerNormOptions({sizes[0]})));
    if (kind == "Flatten") return placed(name, torch::nn::Flatten());
    if (kind == "Experts") return placed(name, Experts(sizes[0], sizes[1], sizes[2]));
    if (kind == "SelfAttention") return self_attention(name, layer, sizes);
    if (kind == "FusedAttention") return fused_attention(name, layer, sizes);
    if (kind == "MultiheadAttention") return packed_attention(name, layer, sizes);
    throw std::invalid_argument("no kind of layer is called " + kind);
  }

  template <class Holder>
  Layer placed(const std::string& name, Holder module) {
    place(name, module);
    return [module](const Tensor& x) mutable { return module->forward(x); };
  }

  /// A Linear; one that is kept as (in, out) in Python when `is_transposed`.
  Layer linear(const std::string& name, const json& layer, int64_t in, int64_t out, bool is_transposed) {
    torch::nn::Linear module(torch::nn::LinearOptions(in, out).bias(layer.value("bias", true)));
    if (is_transposed) transposed_.insert(name + ".weight");
    auto apply = placed(name, module);
    if (layer.contains("tied")) module->weight = embeddings_.at(layer["tied"])->weight;
    return apply;
  }

  Layer embedding(const std::string& name, const json& layer, const std::vector<int64_t>& sizes) {
    auto options = torch::nn::EmbeddingOptions(sizes[0], sizes[1]);
    if (layer.contains("padding_idx")) options.padding_idx(layer["padding_idx"].get<int64_t>());
    if (layer.contains("max_norm")) options.max_norm(layer["max_norm"].get<double>());
    return placed(name, embeddings_.emplace(name, torch::nn::Embedding(options)).first->second);
  }

  template <size_t D, class Holder>
  Layer convolution(const std::string& name, const json& layer, const std::vector<int64_t>& sizes) {
    const auto kernel = layer.at("kernel_size");
    const auto widths = kernel.is_array() ? kernel.get<std::vector<int64_t>>() : std::vector<int64_t>(D, kernel);
    torch::nn::ConvOptions<D> options(sizes[0], sizes[1], widths);
    options.stride(layer.value("stride", 1)).groups(layer.value("groups", 1)).bias(layer.value("bias", true));
    if (layer.value("padding", json(0)) == "same") {
      options.padding(torch::kSame);
    } else {
      options.padding(layer.value("padding", 0));
    }
    return placed(name, Holder(options));
  }

  Layer self_attention(const std::string& name, const json& layer, const std::vector<int64_t>& sizes) {
    const auto width = sizes[0], heads = sizes[1], kv_width = layer.value("kv_width", width);
    const auto project = [&](const char* part, int64_t out) {
      return linear(name + "." + part, json::object(), width, out, /*is_transposed=*/false);
    };
    auto q = project("q_proj", width), o = project("o_proj", width);
    auto k = project("k_proj", kv_width), v = project("v_proj", kv_width);
    return [=](const Tensor& x) { return x + o(attend(q(x), k(x), v(x), heads)); };
  }

  Layer fused_attention(const std::string& name, const json& layer, const std::vector<int64_t>& sizes) {
    const auto width = sizes[0], heads = sizes[1], kv_width = layer.value("kv_width", width);
    const bool is_transposed = layer.value("transposed", false);
    auto qkv = linear(name + ".c_attn", json::object(), width, width + 2 * kv_width, is_transposed);
    auto o = linear(name + ".c_proj", json::object(), width, width, is_transposed);
    return [=](const Tensor& x) {
      const auto parts = qkv(x).split_with_sizes({width, kv_width, kv_width}, -1);
      return x + o(attend(parts[0], parts[1], parts[2], heads));
    };
  }

  Layer packed_attention(const std::string& name, const json& layer, const std::vector<int64_t>& sizes) {
    torch::nn::MultiheadAttention module(
        torch::nn::MultiheadAttentionOptions(sizes[0], sizes[1]).bias(layer.value("bias", true)));
    place(name, module);
    return [module](const Tensor& x) mutable {
      return x + std::get<0>(module->forward(x, x, x, {}, /*need_weights=*/false));
    };
  }

  std::vector<Layer> layers_;
  std::set<std::string> transposed_;
  std::map<std::string, torch::nn::Embedding> embeddings_;
};

std::shared_ptr<Net> make_model(const json& job, const std::map<std::string, Tensor>& tensors) {
  auto model = std::make_shared<Net>(job.at("model"));
  const auto type = tensors.at("model." + model->named_parameters().front().key()).scalar_type();
  if (type != torch::kFloat) model->to(type);  // which converts counts of batches too
  model->fill(tensors);
  model->eval();
  return model;
}

lora::LoRAConfig read_config(const json& job) {
  auto config = lora::read_adapter_config(job.at("config").get<std::string>());
  std::vector<lora::FusedProjection> fused;
  for (const auto& part : job.value("fused", json::array()))
    fused.push_back({part.at("module"), part.at("sizes"), part.at("adapted")});
  return config.fused(fused);
}

lora::LoadOptions load_options(const json& job) {
  lora::LoadOptions options;
  for (const std::string name : job.value("options", json::array())) {
    if (name == "take_tables") options.take_tables(true);
    if (name == "out_proj_twice") options.out_proj_twice(true);
  }
  return options;
}

lora::Adapters adapt(torch::nn::Module& model, const json& job) {
  if (job.contains("adapter")) return lora::load_adapters(model, job["adapter"].get<std::string>(), load_options(job));
  auto adapters = lora::attach(model, read_config(job));
  if (job.contains("second")) adapters.add("second", lora::read_adapter_config(job["second"].get<std::string>()));
  torch::NoGradGuard no_grad;
  for (auto& parameter : adapters.parameters()) parameter.add_(torch::randn_like(parameter), 0.2);
  return adapters;
}

/// The output with the adapter that was added last.
Tensor adapted(Net& model, const lora::Adapters& adapters, const Tensor& input) {
  torch::NoGradGuard no_grad;
  auto active = adapters.activate(adapters.names().back());
  return model.forward(input);
}

/// The losses of AdamW's steps towards a target.
Tensor train(Net& model, const lora::Adapters& adapters, const json& job, const Tensor& input, const Tensor& target) {
  torch::optim::AdamW optimizer(adapters.parameters(), torch::optim::AdamWOptions(job.at("lr").get<double>()));
  std::vector<double> losses;
  auto active = adapters.activate();
  for (int64_t step = 0; step < job.at("steps"); ++step) {
    optimizer.zero_grad();
    auto loss = torch::nn::functional::mse_loss(model.forward(input), target);
    loss.backward();
    optimizer.step();
    losses.push_back(loss.item<double>());
  }
  return torch::tensor(losses, torch::kDouble);
}

/// The output with the adapters in a folder, on a model of its own.
Tensor loaded(const std::string& folder, const json& job, const std::map<std::string, Tensor>& tensors) {
  auto model = make_model(job, tensors);
  const auto options = load_options(job).out_proj_twice(false);  // which is in what was saved
  return adapted(*model, lora::load_adapters(*model, folder, options), tensors.at("input"));
}

void run(const json& job) {
  const auto tensors = lora::read_safetensors(job.at("tensors").get<std::string>());
  const auto input = tensors.at("input");
  torch::manual_seed(1);
  auto model = make_model(job, tensors);
  if (job.contains("trained")) {
    const auto trained = job["trained"].get<std::string>(), start = job.at("start").get<std::string>();
    lora::subtract_start(trained, start, job.at("adapter").get<std::string>());
  }
  auto adapters = adapt(*model, job);
  std::map<std::string, Tensor> output;
  if (job.contains("steps")) output["losses"] = train(*model, adapters, job, input, tensors.at("target"));
  output["adapted"] = adapted(*model, adapters, input);
  if (job.contains("save")) {
    adapters.save_all(job["save"].get<std::string>());
    output["again"] = loaded(job["save"], job, tensors);
  }
  torch::NoGradGuard no_grad;
  output["base"] = model->forward(input);
  lora::MergeGuard merged(adapters, adapters.names().back());
  output["merged"] = model->forward(input);
  lora::write_safetensors(job.at("output").get<std::string>(), output);
}

int main(int argc, char** argv) {
  if (argc != 2) return std::cerr << "usage: exchange_adapter JOBS.json\n", 2;
  torch::set_num_threads(1);
  json jobs;
  std::ifstream(argv[1]) >> jobs;
  for (const auto& job : jobs) {
    std::string error;
    try {
      run(job);
    } catch (const c10::Error& caught) {
      error = caught.what_without_backtrace();
    } catch (const std::exception& caught) {
      error = caught.what();
    }
    std::replace(error.begin(), error.end(), '\n', ' ');
    std::cout << error << "\n";
  }
}
