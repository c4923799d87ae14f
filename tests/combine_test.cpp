// Adapters made of others, against arithmetic on the dense updates.
#include "support/halves.hpp"
#include "support/models.hpp"

#include <lora/attach.hpp>
#include <lora/combine.hpp>
#include <lora/files/safetensors.hpp>
#include <lora/modules/linear.hpp>
#include <lora/peft/checkpoint.hpp>

#include <array>
#include <numeric>

namespace {

using lora::CombineKind;
using lora::CombineOptions;
using lora::LoRAConfig;
using lora::MajoritySign;
using testing::contains;

/// A layer of each kind that is seen as a matrix in a way of its own, in double.
struct LayersImpl : torch::nn::Module {
  LayersImpl() {
    for (auto& bias : {attention->in_proj_bias, attention->out_proj->bias}) torch::nn::init::normal_(bias);
    to(testing::device(), torch::kDouble);
    torch::manual_seed(5);
    x = torch::randn({3, 2, 4}, testing::on_device(torch::kDouble));
  }

  torch::Tensor forward() {
    const auto image = x.reshape({1, 4, 6});
    std::vector<torch::Tensor> outputs{fc(x),
                                       qkv(x),
                                       table(torch::arange(6, x.options().dtype(torch::kLong))),
                                       conv1(image),
                                       conv2(image.unsqueeze(-1).expand({1, 4, 6, 3})),
                                       conv3(image.reshape({1, 4, 3, 2, 1})),
                                       up(image),
                                       std::get<0>(attention(x, x, x)),
                                       std::get<0>(lstm(x)),
                                       torch::matmul(experts, x.reshape({6, 4}).t())};
    std::vector<torch::Tensor> flat;
    for (const auto& output : outputs) flat.push_back(output.flatten());
    return torch::cat(flat);
  }

  torch::nn::Linear fc = register_module("fc", torch::nn::Linear(4, 5));
  torch::nn::Linear qkv = register_module("qkv", torch::nn::Linear(4, 12));
  torch::nn::Embedding table = register_module("table", torch::nn::Embedding(7, 4));
  torch::nn::Conv1d conv1 = register_module("conv1", torch::nn::Conv1d(torch::nn::Conv1dOptions(4, 3, 2)));
  torch::nn::Conv2d conv2 = register_module("conv2", torch::nn::Conv2d(torch::nn::Conv2dOptions(4, 6, 2).groups(2)));
  torch::nn::Conv3d conv3 = register_module("conv3", torch::nn::Conv3d(torch::nn::Conv3dOptions(4, 2, {2, 1, 1})));
  torch::nn::ConvTranspose1d up =
      register_module("up", torch::nn::ConvTranspose1d(torch::nn::ConvTranspose1dOptions(4, 6, 2).groups(2)));
  torch::nn::MultiheadAttention attention = register_module("attention", torch::nn::MultiheadAttention(4, 2));
  torch::nn::LSTM lstm = register_module("lstm", torch::nn::LSTM(4, 3));
  torch::Tensor experts = register_parameter("experts", torch::randn({2, 5, 4}));
  torch::Tensor x;
};
TORCH_MODULE(Layers);

/// Three adapters of different ranks, alphas and layers, one of them with a scale, of one method.
struct Fixture {
  explicit Fixture(const lora::MethodKind& method, const std::vector<lora::MethodKind>& others = {}) {
    torch::manual_seed(7);
    adapters = std::make_unique<lora::Adapters>(*model);
    const bool has_ia3 = method.info().name == "IA3" || (!others.empty() && others.back().info().name == "IA3");
    const auto fused = has_ia3 ? std::vector<lora::FusedProjection>() : kFused;
    const auto second = others.empty() ? method : others.front(), third = others.empty() ? method : others.back();
    adapters->add(
        "a", LoRAConfig(2).alpha(3).method(method).target_modules(kAll).target_parameters({"experts"}).fused(fused));
    adapters->add("b", LoRAConfig(4).alpha(6).method(second).target_modules({"fc", "conv1", "conv2", "attention"}));
    adapters->add("c", LoRAConfig(4).alpha(1).rank_stabilized(true).method(third).target_modules(kAll).fused(fused));
    testing::randomize(adapters->parameters(), 0.3);
    adapters->set_scale("b", -0.6);
    adapters->set_scale("a", "fc", 1.75);
    for (const auto& site : adapters->sites()) sites.push_back(site->name());
    methods = std::string(method.info().name) + " " + std::string(second.info().name);
  }

  /// The updates of one layer in their order, with their weights.
  std::pair<std::vector<torch::Tensor>, std::vector<double>> updates(const std::string& site) const {
    std::vector<torch::Tensor> updates;
    std::vector<double> factors;
    for (const auto& [name, weight] : weights) {
      if (adapters->adapter(name)->part(site) == nullptr) continue;
      updates.push_back(adapters->delta(name, site).detach().to(torch::kCPU));
      factors.push_back(weight);
    }
    return {updates, factors};
  }

  const lora::Site& site(const std::string& name) const {
    for (const auto& source : {"a", "b", "c"}) {
      if (const auto* part = adapters->adapter(source)->part(name)) return *part->site;
    }
    throw std::logic_error(name);
  }

  torch::Tensor forward(const std::string& name) const {
    auto active = adapters->activate(name);
    return model->forward();
  }

  const std::vector<std::string> kAll{"fc", "qkv", "table", "conv1", "conv2", "conv3", "up", "attention", "lstm"};
  const std::vector<lora::FusedProjection> kFused{{"qkv", {3, 5, 4}, {true, false, true}}};
  const lora::WeightedAdapters weights{{"a", 0.5}, {"b", 1.25}, {"c", -2}};
  mutable Layers model;
  std::unique_ptr<lora::Adapters> adapters;
  std::vector<std::string> sites;
  std::string methods;
};

// The kinds, entry by entry, as the papers and PEFT's merge_utils have them.

using Numbers = std::vector<double>;

Numbers numbers(const torch::Tensor& tensor) {
  const auto flat = tensor.detach().to(torch::kCPU, torch::kDouble).contiguous().flatten();
  return {flat.data_ptr<double>(), flat.data_ptr<double>() + flat.numel()};
}

/// Those of an update that can be other than zero: of the fused layer only the first and last part.
std::vector<size_t> entries_of(const lora::Site& site, size_t count) {
  std::vector<size_t> entries;
  for (size_t i = 0; i < count; ++i) {
    if (site.view().part_rows().empty() || i < 12 || i >= 32) entries.push_back(i);
  }
  return entries;
}

/// Zero but for the largest of `entries`.
Numbers trimmed(const Numbers& update, std::vector<size_t> entries, double density) {
  std::stable_sort(entries.begin(), entries.end(),
                   [&](size_t a, size_t b) { return std::abs(update[a]) > std::abs(update[b]); });
  Numbers kept(update.size(), 0);
  const auto count = static_cast<size_t>(density * static_cast<double>(entries.size()));
  for (size_t i = 0; i < count; ++i) kept[entries[i]] = update[entries[i]];
  return kept;
}

double summed(const Numbers& values, const Numbers& weights) {
  return std::inner_product(values.begin(), values.end(), weights.begin(), 0.0);
}

double elected(const Numbers& values, const Numbers& weights, MajoritySign election) {
  double votes = 0, sum = 0, voters = 0;
  for (auto value : values) votes += election == MajoritySign::kTotal ? value : value > 0 ? 1 : value < 0 ? -1 : 0;
  for (size_t i = 0; i < values.size(); ++i) {
    if (values[i] == 0 || (values[i] > 0) != (votes >= 0)) continue;
    sum += weights[i] * values[i];
    voters += 1;
  }
  return voters == 0 ? 0 : sum / voters;
}

double merged(const CombineOptions& options, const Numbers& values, const Numbers& weights) {
  const bool elects = options.kind() == CombineKind::kTies || options.kind() == CombineKind::kDareTies;
  return elects ? elected(values, weights, options.majority_sign()) : summed(values, weights);
}

/// What a kind without chance makes of the updates.
torch::Tensor expected(const CombineOptions& options, const lora::Site& site, const std::vector<torch::Tensor>& updates,
                       const Numbers& weights) {
  const bool trims = options.kind() == CombineKind::kTies || options.kind() == CombineKind::kMagnitudePrune;
  std::vector<Numbers> kept;
  for (const auto& update : updates) {
    const auto all = numbers(update);
    kept.push_back(trims ? trimmed(all, entries_of(site, all.size()), *options.density()) : all);
  }
  Numbers result;
  for (size_t i = 0; i < kept.front().size(); ++i) {
    Numbers values;
    for (const auto& update : kept) values.push_back(update[i]);
    result.push_back(merged(options, values, weights));
  }
  return torch::tensor(result, torch::kDouble).reshape(updates.front().sizes());
}

/// Singular values of a layer's update, of its matrices one after another.
torch::Tensor singular_values(const lora::Site& site, const torch::Tensor& update) {
  auto s = torch::linalg_svdvals(site.view().matrix(update));
  return s.dim() > 1 ? s.transpose(-1, -2) : s.unsqueeze(-1);  // (rank, matrices)
}

double energy(const torch::Tensor& tensor) { return tensor.square().sum().item<double>(); }

std::vector<std::vector<lora::MethodKind>> mixtures() {
  std::vector<std::vector<lora::MethodKind>> all;
  for (const auto& method : lora::all_methods()) all.push_back({method});
  all.push_back({lora::LowRank(), lora::DoRA(), lora::IA3()});
  all.push_back({lora::VeRA(), lora::LowRank(), lora::LowRank()});
  return all;
}

Fixture any_fixture() {
  const auto all = mixtures();
  const auto& methods = all[GENERATE_REF(range(size_t{0}, all.size()))];
  return Fixture(methods.front(), std::vector<lora::MethodKind>(methods.begin() + 1, methods.end()));
}

}  // namespace

TEST_CASE("Every kind, method and layer: the combined update is the arithmetic on the updates") {
  const auto f = any_fixture();
  if (GENERATE(false, true)) {  // weights that are held in few bits
    for (const auto& name : f.adapters->names()) f.adapters->quantize(*f.adapters->adapter(name), testing::Halves());
  }
  struct Row {
    CombineOptions options;
    double tolerance;
  };
  const std::vector<Row> rows{
      {{}, 1e-13},
      {CombineKind::kLinear, 1e-12},
      {CombineOptions(CombineKind::kSvd).energy(1), 1e-12},
      {CombineOptions(CombineKind::kSvd).rank(12), 1e-12},  // of which no layer has as many
      {CombineOptions(CombineKind::kTies).density(0.4), 1e-13},
      {CombineOptions(CombineKind::kTies).density(0.4).majority_sign(MajoritySign::kFrequency), 1e-13},
      {CombineOptions(CombineKind::kTies).density(1).rank(12), 1e-12},
      {CombineOptions(CombineKind::kMagnitudePrune).density(0.3), 1e-13},
      {CombineOptions(CombineKind::kDareLinear).density(1), 1e-13},
      {CombineOptions(CombineKind::kDareTies).density(1), 1e-13},
  };
  for (size_t i = 0; i < rows.size(); ++i) {
    const auto name = "combined " + std::to_string(i);
    f.adapters->combine(name, f.weights, rows[i].options);
    for (const auto& site : f.sites) {
      INFO(f.methods << " " << i << " " << site);
      const auto [updates, weights] = f.updates(site);
      const auto wanted = expected(rows[i].options, f.site(site), updates, weights);
      CHECK(wanted.abs().max().item<double>() > 0.01);
      CHECK(testing::distance(f.adapters->delta(name, site), wanted) < rows[i].tolerance);
    }
    for (const auto& layer : f.adapters->adapter(name)->parts) {
      if (layer.role == lora::AdapterPart::Role::kLayer) CHECK(layer.method->info().name == "LowRank");
    }
  }
}

TEST_CASE("Biases and what is trained in full are the weighted sum of the differences, whatever the kind") {
  struct Row {
    std::string what;
    LoRAConfig first, second;
    std::vector<std::string> tensors;  // that the combination changes beside the layers
    lora::Bias bias;
  };
  const auto of = [](std::vector<std::string> names) {
    return LoRAConfig(2).alpha(3).target_modules(std::move(names));
  };
  const std::vector<Row> rows{
      {"all", of({"fc"}).bias(lora::Bias::kAll), of({"conv2"}), {"fc.bias", "up.bias"}, lora::Bias::kAll},
      {"adapted",
       of({"fc", "table"}).bias(lora::Bias::kAdaptedOnly),
       of({"conv2"}).bias(lora::Bias::kAdaptedOnly),
       {"fc.bias", "conv2.bias"},
       lora::Bias::kAdaptedOnly},
      {"own",
       of({"fc"}).lora_bias(true),
       of({"fc", "conv2"}).lora_bias(true),
       {"fc.bias", "conv2.bias"},
       lora::Bias::kNone},
      {"one own", of({"fc"}).lora_bias(true), of({"fc", "table"}), {"fc.bias"}, lora::Bias::kAdaptedOnly},
      {"own and all",
       of({"fc"}).lora_bias(true),
       of({"table"}).bias(lora::Bias::kAll),
       {"fc.bias", "qkv.bias"},
       lora::Bias::kAll},
      {"IA3", of({"fc", "conv2"}).method(lora::IA3()), of({"fc"}), {"fc.bias", "conv2.bias"}, lora::Bias::kAdaptedOnly},
      {"IA3 of attention",
       of({"attention"}).method(lora::IA3()),
       of({"fc"}),
       {"attention.in_proj_bias", "attention.out_proj.bias"},
       lora::Bias::kAdaptedOnly},
      {"saved",
       of({"fc"}).modules_to_save({"up", "norm"}),
       of({"conv2"}).modules_to_save({"up"}),
       {"up.weight", "up.bias", "norm.weight", "norm.running_var"},
       lora::Bias::kNone},
      {"saved and adapted",
       of({"conv2"}),
       of({"fc", "conv2"}).bias(lora::Bias::kAll).modules_to_save({"norm"}),
       {"norm.weight"},
       lora::Bias::kAll},
  };
  for (const auto& row : rows) {
    for (const auto& options : {CombineOptions(), CombineOptions(CombineKind::kTies).density(0.5)}) {
      INFO(row.what << " " << static_cast<int>(options.kind()));
      Layers model;
      model->register_module("norm", torch::nn::BatchNorm1d(3))->to(testing::device(), torch::kDouble);
      lora::Adapters adapters(*model);
      adapters.add("first", row.first);
      adapters.add("second", row.second);
      testing::randomize(adapters.parameters(), 0.3);
      for (const auto& name : {"first", "second"}) {  // buffers are no parameters
        if (adapters.adapter(name)->part("norm.running_var") == nullptr) continue;
        adapters.adapter(name)->part("norm.running_var")->method->tensors().front().tensor->add_(0.5);
      }
      std::map<std::string, torch::Tensor> before, wanted;
      const auto tensors = [&] {
        auto all = model->named_parameters();
        for (const auto& item : model->named_buffers()) all.insert(item.key(), item.value());
        return all;
      };
      for (const auto& item : tensors()) before[item.key()] = item.value().detach().clone();
      for (const auto& item : tensors()) wanted[item.key()] = torch::zeros_like(item.value());
      adapters.set_scale("second", 3);
      for (const auto& [name, weight] : std::map<std::string, double>{{"first", 0.75}, {"second", -1.5}}) {
        adapters.merge(name);
        for (const auto& item : tensors()) wanted[item.key()] += weight * (item.value().detach() - before[item.key()]);
        adapters.unmerge();
      }
      adapters.combine("sum", {{"first", 0.75}, {"second", -1.5}}, options);
      CHECK(adapters.config("sum").bias() == row.bias);
      adapters.merge("sum");
      for (const auto& name : row.tensors) {
        INFO(name);
        CHECK(wanted[name].abs().max().item<double>() > 0.01);
        CHECK(testing::distance(tensors()[name] - before[name], wanted[name]) < 1e-12);
      }
      if (!options.prunes()) {
        for (const auto& item : tensors())
          CHECK(testing::distance(item.value() - before[item.key()], wanted[item.key()]) < 1e-12);
      }
    }
  }
}

TEST_CASE("A rank or an energy keeps the largest singular values of the sum, and alpha is the rank") {
  const auto f = any_fixture();
  INFO(f.methods);
  f.adapters->combine("sum", f.weights);
  for (const auto& options : {CombineOptions(CombineKind::kSvd).rank(2), CombineOptions(CombineKind::kSvd).energy(0.8),
                              CombineOptions(CombineKind::kSvd).rank(2).energy(0.9)}) {
    f.adapters->combine("cut", f.weights, options);
    for (const auto& part : f.adapters->adapter("cut")->parts) {
      if (part.role != lora::AdapterPart::Role::kLayer) continue;
      INFO(part.site->name());
      const auto sum = f.adapters->delta("sum", part.site->name()), cut = f.adapters->delta("cut", part.site->name());
      const auto s = singular_values(*part.site, sum);
      const auto shares = part.site->view().shape().rank_shares, rank = part.method->options().rank() / shares;
      const auto tail = [&](int64_t kept) { return energy(s.slice(0, std::min(kept, s.size(0)))); };
      CHECK(part.method->options().alpha() == static_cast<double>(rank * shares));
      if (!options.energy()) CHECK(rank * shares == 2);
      if (options.rank()) CHECK(rank * shares <= 2);
      if (options.energy() && !options.rank() && part.module != "attention") {  // whose two weights have one rank
        CHECK(tail(rank) <= 0.2 * energy(s));
        CHECK(tail(rank - 1) > 0.2 * energy(s));
      }
      if (part.module != "attention") CHECK(energy(sum - cut) == testing::Approx(tail(rank)).margin(1e-12));
    }
    f.adapters->remove("cut");
  }
}

TEST_CASE("A concatenation has A and B of its parts, a linear sum the smallest rank that holds it") {
  Fixture f{lora::LowRank()};
  f.adapters->combine("sum", f.weights);
  const auto rank = [&](const std::string& name, const std::string& layer) {
    return f.adapters->adapter(name)->part(layer)->method->options().rank();
  };
  CHECK((rank("sum", "fc") == 10 && rank("sum", "table") == 6 && rank("sum", "experts") == 2));
  CHECK((rank("sum", "conv2") == 10 && rank("sum", "attention.out_proj") == 10));
  CHECK(f.adapters->config("sum").rank() == 6);  // most modules have it
  const auto parameters = f.adapters->named_parameters("sum");
  const auto a = f.adapters->named_parameters("a"), c = f.adapters->named_parameters("c");
  CHECK(torch::equal(parameters["table.lora_A"], torch::cat({a["table.lora_A"], c["table.lora_A"]})));
  const auto b = torch::cat({a["table.lora_B"] * (3. / 2 * 0.5), c["table.lora_B"] * (1 / 2. * -2)}, 1);
  CHECK(testing::distance(parameters["table.lora_B"], b) < 1e-15);
  for (const auto& item : parameters) CHECK(item.value().requires_grad());

  f.adapters->combine("half", {{"a", 0.25}, {"a", 0.25}, {"sum", 0}}, CombineKind::kLinear);
  CHECK((rank("half", "fc") == 2 && rank("half", "conv2") == 2 && rank("half", "table") == 2));
  for (const auto& site : {"fc", "conv2", "qkv", "experts"})
    CHECK(testing::distance(f.adapters->delta("half", site), f.adapters->delta("a", site) * 0.5) < 1e-13);
  f.adapters->combine("nothing", {{"a", 1}, {"a", -1}}, CombineKind::kLinear);
  CHECK(rank("nothing", "fc") == 1);
  CHECK(energy(f.adapters->delta("nothing", "fc").detach()) < 1e-25);
}

TEST_CASE("DARE keeps a random choice of entries, divided by the density, of which a seed decides") {
  const double density = 0.6;
  for (auto kind : {CombineKind::kDareLinear, CombineKind::kDareTies}) {
    for (auto election : {MajoritySign::kTotal, MajoritySign::kFrequency}) {
      Fixture f{lora::LowRank()};
      const auto options = CombineOptions(kind).density(density).majority_sign(election);
      f.adapters->combine("seeded", f.weights, CombineOptions(options).seed(3));
      double kept = 0, all = 0;
      for (const auto& site : f.sites) {
        INFO(site);
        const auto [updates, weights] = f.updates(site);
        const auto result = numbers(f.adapters->delta("seeded", site));
        std::vector<Numbers> given;
        for (const auto& update : updates) given.push_back(numbers(update));
        for (auto entry : entries_of(f.site(site), result.size())) {
          double nearest = 1, chosen = 0;
          for (unsigned choice = 0; choice < 1U << given.size(); ++choice) {
            Numbers values;
            double count = 0;
            for (size_t i = 0; i < given.size(); ++i) {
              const bool is_in = (choice >> i & 1U) != 0;
              values.push_back(is_in ? given[i][entry] / density : 0);
              count += is_in ? 1 : 0;
            }
            const auto distance = std::abs(merged(options, values, weights) - result[entry]);
            if (distance < nearest) {
              nearest = distance;
              chosen = count;
            }
          }
          CHECK(nearest < 1e-12);
          kept += chosen;
          all += static_cast<double>(given.size());
        }
      }
      if (kind == CombineKind::kDareLinear) CHECK(kept / all == testing::Approx(density).margin(0.05));

      const auto with = [&](const std::string& name, const CombineOptions& by) {
        f.adapters->combine(name, f.weights, by);
        return f.adapters->delta(name, "fc");
      };
      CHECK(torch::equal(with("same", CombineOptions(options).seed(3)), f.adapters->delta("seeded", "fc")));
      CHECK_FALSE(torch::equal(with("other", CombineOptions(options).seed(4)), f.adapters->delta("seeded", "fc")));
      torch::manual_seed(1);
      const auto once = with("once", options);
      CHECK_FALSE(torch::equal(with("next", options), once));
      torch::manual_seed(1);
      CHECK(torch::equal(with("again", options), once));
    }
  }
}

TEST_CASE("A combined adapter acts like the weights that it stands for, active and merged, and comes back from files") {
  const auto f = any_fixture();
  INFO(f.methods);
  for (const auto& options :
       {CombineOptions(), CombineOptions(CombineKind::kSvd).rank(2), CombineOptions(CombineKind::kTies).density(0.5)}) {
    f.adapters->combine("sum", f.weights, options);
    const auto base = f.model->forward().detach();
    const auto active = f.forward("sum").detach();
    CHECK(testing::distance(active, base) > 0.1);
    if (options.kind() == CombineKind::kConcatenation) {
      auto together = f.adapters->activate(f.weights);
      CHECK(testing::distance(f.model->forward(), active) < 1e-12);
    }
    std::map<std::string, torch::Tensor> pristine;
    for (const auto& item : f.model->named_parameters()) pristine[item.key()] = item.value().detach().clone();
    f.adapters->merge("sum");
    CHECK(testing::distance(f.model->forward(), active) < 1e-12);
    CHECK(testing::distance(f.model->fc->weight - pristine["fc.weight"], f.adapters->delta("sum", "fc")) < 1e-13);
    f.adapters->unmerge();

    testing::TemporaryFolder folder;
    f.adapters->save(folder.path(), "sum");
    Layers other;
    {
      torch::NoGradGuard no_grad;
      for (auto& item : other->named_parameters()) item.value().copy_(pristine[item.key()]);
    }
    auto loaded = lora::load_adapter(*other, folder.path());
    {
      auto scope = loaded.activate();
      CHECK(testing::distance(other->forward(), active) < 1e-12);
    }
    for (const auto& part : f.adapters->adapter("sum")->parts) {
      INFO(part.site->name());
      const auto& name = part.site->name();
      if (name.find("attention") == 0 && loaded.adapter("default")->part(name) == nullptr) continue;  // trained in full
      CHECK(testing::distance(loaded.delta("default", name), f.adapters->delta("sum", name)) < 1e-14);
    }
    f.adapters->remove("sum");
  }
}

TEST_CASE("Names that are ends of other names are meant as a whole, and what was not adapted is not") {
  torch::manual_seed(3);
  testing::Stack model(2);
  model->register_module("q_proj", torch::nn::Linear(8, 8))->to(testing::device());
  lora::Adapters adapters(*model);
  adapters.add("a", LoRAConfig(2).target_modules(lora::regex("q_proj|lm_head")));
  adapters.add("b", LoRAConfig(3).target_modules({"layers.1.v_proj"}));
  testing::randomize(adapters.parameters());
  adapters.combine("sum", {{"a"}, {"b"}});
  std::vector<std::string> names;
  for (const auto& part : adapters.adapter("sum")->parts) names.push_back(part.site->name());
  std::sort(names.begin(), names.end());
  CHECK(names == std::vector<std::string>{"layers.1.v_proj", "lm_head", "q_proj"});
  testing::TemporaryFolder folder;
  adapters.save(folder.path(), "sum");
  adapters.load("loaded", folder.path());
  for (const auto& name : names)
    CHECK(testing::distance(adapters.delta("loaded", name), adapters.delta("sum", name)) == 0);
}

TEST_CASE("A combination is made of the weights as they are without what is merged, and can be trained") {
  Fixture f{lora::DoRA()};
  f.adapters->combine("before", f.weights);
  f.adapters->merge("c");
  f.adapters->combine("after", f.weights);
  f.adapters->unmerge();
  CHECK(testing::distance(f.adapters->delta("after", "fc"), f.adapters->delta("before", "fc")) == 0);
  f.forward("after").sin().sum().backward();
  for (const auto& item : f.adapters->named_parameters("after")) {
    INFO(item.key());
    CHECK(item.value().grad().defined());
  }
  f.adapters->remove("a");
  f.adapters->remove("b");
  f.adapters->remove("c");
  CHECK(f.adapters->delta("after", "fc").abs().max().item<double>() > 0.1);
}

TEST_CASE(
    "Adapters of modules that are trained in full alone, of own layers and of parts of an attention are combined, "
    "too") {
  const auto of = [](std::vector<std::string> names) {
    return LoRAConfig(2).alpha(3).target_modules(std::move(names));
  };
  const auto none = LoRAConfig(2).target_modules(lora::regex("dummy-target-modules"));
  struct Row {
    std::string what;
    LoRAConfig first, second;
    std::vector<std::string> changed;
  };
  const std::vector<Row> rows{
      {"full",
       LoRAConfig(none).modules_to_save({"fc"}),
       LoRAConfig(none).modules_to_save({"up"}),
       {"fc.weight", "up.weight"}},
      {"adapted first", of({"conv1", "fc"}), LoRAConfig(none).modules_to_save({"fc"}), {"fc.weight", "conv1.weight"}},
      {"all of it in full", of({"fc"}), LoRAConfig(none).modules_to_save({"fc"}), {"fc.weight"}},
      {"inputs and outputs",
       of({"attention"}).exclude_modules({"attention.out_proj"}),
       of({"attention.out_proj"}),
       {"attention.in_proj_weight", "attention.out_proj.weight"}},
      {"inputs",
       of({"attention"}).exclude_modules({"attention.out_proj"}),
       of({"fc"}),
       {"attention.in_proj_weight", "fc.weight"}},
      {"outputs", of({"attention.out_proj"}), of({"fc"}), {"attention.out_proj.weight", "fc.weight"}},
      {"parameter", LoRAConfig(2).target_parameters({"experts", "up.weight"}), of({"fc"}), {"experts", "fc.weight"}},
  };
  for (const auto& row : rows) {
    INFO(row.what);
    Layers model;
    lora::Adapters adapters(*model);
    adapters.add("first", row.first);
    adapters.add("second", row.second);
    testing::randomize(adapters.parameters(), 0.3);
    std::map<std::string, torch::Tensor> before, wanted;
    for (const auto& item : model->named_parameters()) before[item.key()] = item.value().detach().clone();
    for (const auto& item : before) wanted[item.first] = item.second.clone();
    for (const auto& [name, weight] : std::map<std::string, double>{{"first", 0.75}, {"second", -1.5}}) {
      adapters.merge(name);
      for (const auto& item : model->named_parameters())
        wanted[item.key()] += weight * (item.value().detach() - before[item.key()]);
      adapters.unmerge();
    }
    adapters.combine("sum", {{"first", 0.75}, {"second", -1.5}});
    testing::TemporaryFolder folder;
    adapters.save(folder.path(), "sum");
    adapters.load("loaded", folder.path());
    for (const auto& name : {"sum", "loaded"}) {
      adapters.merge(name);
      for (const auto& item : model->named_parameters()) {
        INFO(name << " " << item.key());
        CHECK(testing::distance(item.value(), wanted[item.key()]) < 1e-12);
      }
      for (const auto& changed : row.changed)
        CHECK(testing::distance(model->named_parameters()[changed], before[changed]) > 0.01);
      adapters.unmerge();
    }
  }
}

TEST_CASE("Layers that have an adapter of their own are combined with further ones") {
  torch::manual_seed(8);
  torch::nn::Sequential model(lora::LoRALinear<>(torch::nn::Linear(6, 5), lora::LoRAOptions(2).alpha(3)));
  model->to(testing::device());
  auto adapters = lora::adapters_of(*model);
  adapters.add("other", LoRAConfig(3).alpha(2).target_modules({"0"}));
  testing::randomize(adapters.parameters());
  adapters.combine("sum", {{"default", 0.5}, {"other", -1}});
  const auto wanted = adapters.delta("default", "0") * 0.5 - adapters.delta("other", "0");
  CHECK(testing::distance(adapters.delta("sum", "0"), wanted) < 1e-6);
}

TEST_CASE("A head that is tied to its embedding, and ranks that groups do not divide") {
  testing::Tied tied;
  lora::Adapters adapters(*tied);
  adapters.add("head", LoRAConfig(2).alpha(3).target_modules({"head"}));
  adapters.add("table", LoRAConfig(2).alpha(3).target_modules({"tokens"}));
  testing::randomize(adapters.parameters());
  adapters.combine("sum", {{"head", -1}, {"table", 2}});
  CHECK(testing::distance(adapters.delta("sum", "head"), -adapters.delta("head", "head")) < 1e-6);
  CHECK(testing::distance(adapters.delta("sum", "tokens"), 2 * adapters.delta("table", "tokens")) < 1e-6);

  Fixture f{lora::LowRank()};
  f.adapters->combine("three", f.weights, CombineOptions(CombineKind::kSvd).rank(3));
  const auto three = f.adapters->adapter("three");
  CHECK(three->part("conv2")->method->options().rank() == 4);
  CHECK(three->part("fc")->method->options().rank() == 3);
  CHECK(three->config.rank() == 3);
}

TEST_CASE("Tables that the files of the parts hold beside them are in the file of the combination") {
  Layers model;
  testing::TemporaryFolder folder;
  lora::Adapters adapters(*model);
  adapters.add("a", LoRAConfig(2).target_modules({"fc"}));
  adapters.save(folder / "a");
  auto file = lora::read_safetensors(folder / "a" / "adapter_model.safetensors");
  file["base_model.model.table.weight"] = model->table->weight.detach();
  lora::write_safetensors(folder / "a2.safetensors", file);
  std::filesystem::rename(folder / "a2.safetensors", folder / "a" / "adapter_model.safetensors");
  adapters.load("read", folder / "a");
  adapters.add("b", LoRAConfig(2).target_modules({"table"}));
  testing::randomize(adapters.parameters());
  for (const auto& [parts, key] :
       std::map<std::string, std::string>{{"read", "table.weight"}, {"b", "table.base_layer.weight"}}) {
    adapters.combine("sum", {{"read"}, {parts}});
    adapters.save(folder / "sum", "sum");
    const auto written = lora::read_safetensors(folder / "sum" / "adapter_model.safetensors");
    REQUIRE(written.count("base_model.model." + key) == 1);
    CHECK(testing::distance(written.at("base_model.model." + key), model->table->weight) == 0);
    adapters.load("again", folder / "sum");
    CHECK(testing::distance(adapters.delta("again", "fc"), adapters.delta("sum", "fc")) == 0);
    adapters.remove("again");
    adapters.remove("sum");
  }
}

TEST_CASE("Layers without inputs have nothing to combine, and weights that are read later count") {
  torch::manual_seed(9);
  torch::nn::Sequential model(torch::nn::Linear(3, 2));
  model->register_parameter("none", torch::empty({3, 0}));
  model->to(testing::device(), torch::kDouble);
  lora::Adapters adapters(*model);
  adapters.add("a", LoRAConfig(2).target_modules({"0"}).target_parameters({"none"}));
  adapters.add("b", LoRAConfig(2).method(lora::DoRA()).target_modules({"0"}).target_parameters({"none"}));
  testing::randomize(adapters.parameters("a"));
  for (const auto& options :
       {CombineOptions(), CombineOptions(CombineKind::kLinear), CombineOptions(CombineKind::kSvd).rank(2),
        CombineOptions(CombineKind::kTies).density(0.5)}) {
    {
      torch::NoGradGuard no_grad;
      for (auto& item : model->named_parameters()) item.value().normal_();
    }
    adapters.combine("sum", {{"a"}, {"b"}}, options);
    CHECK(adapters.delta("sum", "none").sizes() == torch::IntArrayRef({3, 0}));
    if (!options.prunes()) CHECK(testing::distance(adapters.delta("sum", "0"), adapters.delta("a", "0")) < 1e-14);
    adapters.remove("sum");
  }
}

TEST_CASE("A model in half precision gets the sum in float") {
  torch::manual_seed(4);
  torch::nn::Sequential model(torch::nn::Linear(6, 5));
  model->to(testing::device(), torch::kBFloat16);
  lora::Adapters adapters(*model);
  adapters.add("a", LoRAConfig(2).alpha(3).target_modules({"0"}));
  adapters.add("b", LoRAConfig(2).alpha(3).method(lora::DoRA()).target_modules({"0"}).bias(lora::Bias::kAll));
  testing::randomize(adapters.parameters());
  const auto wanted = adapters.delta("a", "0") * 0.3 - adapters.delta("b", "0") * 2;
  for (auto kind : {CombineKind::kConcatenation, CombineKind::kLinear}) {
    adapters.combine("sum", {{"a", 0.3}, {"b", -2}}, kind);
    CHECK(adapters.delta("sum", "0").scalar_type() == torch::kFloat);
    CHECK(testing::distance(adapters.delta("sum", "0"), wanted) < 1e-5);
    adapters.remove("sum");
  }
}

TEST_CASE("FlexLoRA: clients of different ranks get the average back in their own ranks") {
  torch::manual_seed(6);
  testing::Stack model(1);
  lora::Adapters adapters(*model);
  adapters.add("phone", LoRAConfig(2).alpha(3).target_modules({"q_proj", "v_proj"}));
  adapters.add("laptop", LoRAConfig(5).alpha(3).target_modules({"q_proj", "v_proj"}));
  testing::randomize(adapters.parameters());
  adapters.combine("average", {{"phone", 0.2}, {"laptop", 0.8}});
  const auto average = [](int64_t rank) { return CombineOptions(CombineKind::kSvd).rank(rank); };
  adapters.combine("to phone", {{"average"}}, average(2));
  adapters.combine("to laptop", {{"average"}}, average(5));
  for (const auto& [name, rank] : std::map<std::string, int64_t>{{"phone", 2}, {"laptop", 5}}) {
    CHECK(adapters.config("to " + name).rank() == rank);
    CHECK(adapters.config("to " + name).rank_pattern().empty());
    for (const auto& item : adapters.named_parameters(name)) {
      INFO(item.key());
      CHECK(adapters.named_parameters("to " + name)[item.key()].sizes() == item.value().sizes());
    }
    const auto site = std::string("layers.0.q_proj");
    const auto sum = (adapters.delta("phone", site) * 0.2 + adapters.delta("laptop", site) * 0.8).detach().cpu();
    const auto tail = energy(torch::linalg_svdvals(sum).slice(0, rank));
    CHECK(energy(sum - adapters.delta("to " + name, site).cpu()) == testing::Approx(tail).margin(1e-10));
  }
}

TEST_CASE("What cannot be combined is an error that says why, and changes nothing") {
  Fixture f{lora::LowRank()};
  auto& adapters = *f.adapters;
  const auto nan = std::numeric_limits<double>::quiet_NaN();
  const auto svd = CombineOptions(CombineKind::kSvd), ties = CombineOptions(CombineKind::kTies);
  struct Row {
    std::string name;
    lora::WeightedAdapters parts;
    CombineOptions options;
    std::string error;
  };
  const std::vector<Row> rows{
      {"new", {}, {}, "lora::combine: name the adapters to combine; there are: a, b, c"},
      {"new", {{"a"}, {"d"}}, {}, "there is no adapter \"d\"; there are: a, b, c"},
      {"b", {{"a"}}, {}, "lora::combine: there is an adapter \"b\" already"},
      {"", {{"a"}}, {}, "has to have a name that is not empty"},
      {"new", {{"a"}, {"b", nan}}, {}, "the weight of \"b\" has to be a finite number, but got nan"},
      {"new", {{"a"}}, CombineOptions().rank(2), "a concatenation keeps all ranks; kSvd has one by rank or energy"},
      {"new", {{"a"}}, svd, "kSvd needs a rank or an energy"},
      {"new", {{"a"}}, CombineOptions(svd).rank(0), "rank has to be at least 1, but got 0"},
      {"new", {{"a"}}, CombineOptions(svd).energy(1.5), "energy has to be in (0, 1], but got 1.5"},
      {"new", {{"a"}}, CombineOptions(svd).energy(nan), "energy has to be in (0, 1], but got nan"},
      {"new", {{"a"}}, ties, "density has to be given for a kind that prunes"},
      {"new", {{"a"}}, CombineOptions(ties).density(0), "density has to be in (0, 1], but got 0"},
      {"new", {{"a"}}, CombineOptions(svd).rank(2).density(0.5), "density is for kTies, kDareLinear"},
      {"new", {{"a", 1e308}}, {}, "is not finite"},
  };
  for (const auto& row : rows) {
    INFO(row.error);
    CHECK_THAT(testing::error_of([&] { adapters.combine(row.name, row.parts, row.options); }), contains(row.error));
    CHECK(adapters.names() == std::vector<std::string>{"a", "b", "c"});
  }
  {
    torch::NoGradGuard no_grad;
    adapters.named_parameters("c")["conv2.lora_B"][0][0][0] = nan;
  }
  for (const auto& options : {CombineOptions(), CombineOptions(ties).density(0.5)}) {
    CHECK_THAT(testing::error_of([&] {
                 adapters.combine("new", {{"a"}, {"c"}}, options);
               }),
               contains("lora::combine: the update of adapter \"c\" to conv2 is not finite"));
  }
  CHECK(adapters.names() == std::vector<std::string>{"a", "b", "c"});

  Layers other;
  lora::Adapters two(*other);
  two.add("parameter", LoRAConfig(2).target_parameters({"fc.weight"}));
  two.add("layer", LoRAConfig(2).target_modules({"fc"}));
  two.add("full", LoRAConfig(2).target_modules({"up"}).modules_to_save({"fc"}));
  CHECK_THROWS_WITH(two.combine("sum", {{"parameter"}, {"layer"}}), contains("are the same weight; adapt one of them"));
  CHECK_THROWS_WITH(two.combine("sum", {{"parameter"}, {"full"}}), contains("fc.weight has no place beside what"));
}
