// Which part of a weight an operand is: every view of weights that lie in memory in every way, against the set of
// places that it has there.
#include "support/testing.hpp"

#include <lora/weight/part.hpp>

#include <algorithm>
#include <set>

namespace {

using lora::detail::Part;
using torch::Tensor;
using Sizes = std::vector<int64_t>;

/// 0, 1, 2, ...: every number is the place where it lies.
Tensor memory(int64_t places) { return torch::arange(places, testing::on_device(torch::kDouble)); }

Tensor counted(const Sizes& sizes) { return memory(c10::multiply_integers(sizes)).view(sizes); }

/// Other numbers that lie as those of `weight` do, in a memory as large.
Tensor laid_out_alike(const Tensor& weight) {
  const auto places = static_cast<int64_t>(weight.storage().nbytes() / weight.element_size());
  return torch::randn({places}, weight.options()).as_strided(weight.sizes(), weight.strides(), weight.storage_offset());
}

std::set<double> places_of(const Tensor& counted) {
  const auto flat = counted.to(torch::kCPU).contiguous().view(-1);
  const auto* first = flat.data_ptr<double>();
  return {first, first + flat.numel()};
}

struct Weight {
  const char* name;
  std::function<Tensor()> make;
};

const std::vector<Weight> kWeights{
    {"a matrix",
     [] {
       return counted({4, 6});
     }},
    {"a square matrix",
     [] {
       return counted({4, 4});
     }},
    {"one row",
     [] {
       return counted({1, 5});
     }},
    {"one column",
     [] {
       return counted({5, 1});
     }},
    {"one number",
     [] {
       return counted({1, 1});
     }},
    {"a bias", [] { return counted({5}); }},
    {"a scalar", [] { return memory(1)[0]; }},
    {"a matrix kept as (in, out)",
     [] {
       return counted({6, 4}).t();
     }},
    {"a square matrix kept as (in, out)",
     [] {
       return counted({4, 4}).t();
     }},
    {"one row kept as (in, out)",
     [] {
       return counted({5, 1}).t();
     }},
    {"one column kept as (in, out)",
     [] {
       return counted({1, 5}).t();
     }},
    {"some rows of a packed matrix",
     [] {
       return counted({12, 3}).narrow(0, 4, 4);
     }},
    {"one row of a packed matrix",
     [] {
       return counted({12, 3}).narrow(0, 4, 1);
     }},
    {"some columns of a packed matrix",
     [] {
       return counted({4, 12}).narrow(1, 4, 6);
     }},
    {"one column of a packed matrix",
     [] {
       return counted({4, 12}).narrow(1, 4, 1);
     }},
    {"a block of a packed matrix",
     [] {
       return counted({9, 12}).narrow(1, 4, 6).narrow(0, 3, 4);
     }},
    {"some rows of a packed matrix kept as (in, out)",
     [] {
       return counted({3, 12}).t().narrow(0, 4, 4);
     }},
    {"some columns of a packed matrix kept as (in, out)",
     [] {
       return counted({12, 3}).t().narrow(1, 4, 4);
     }},
    {"every second row",
     [] {
       return counted({8, 3}).slice(0, 1, 8, 2);
     }},
    {"every second number",
     [] {
       return counted({4, 6, 2}).select(2, 1);
     }},
    {"a part of a flat memory",
     [] {
       return memory(40).narrow(0, 7, 24).view({4, 6});
     }},
    {"one of a batch",
     [] {
       return counted({3, 4, 6})[1];
     }},
    {"experts",
     [] {
       return counted({3, 4, 2});
     }},
    {"some experts",
     [] {
       return counted({5, 4, 2}).narrow(0, 1, 3);
     }},
    {"experts, some rows of each",
     [] {
       return counted({3, 6, 2}).narrow(1, 1, 4);
     }},
    {"experts, kept transposed",
     [] {
       return counted({3, 2, 4}).transpose(1, 2);
     }},
    {"experts, the last dimension first",
     [] {
       return counted({2, 3, 4}).permute({1, 2, 0});
     }},
    {"one expert",
     [] {
       return counted({1, 4, 2});
     }},
    {"a kernel",
     [] {
       return counted({4, 3, 2, 5});
     }},
    {"a kernel, channels last",
     [] {
       return counted({4, 3, 2, 5}).contiguous(at::MemoryFormat::ChannelsLast);
     }},
    {"a kernel of one number each",
     [] {
       return counted({4, 3, 1, 1});
     }},
    {"some channels of a kernel",
     [] {
       return counted({4, 6, 2, 2}).narrow(1, 2, 3);
     }},
};

/// The numbers of a dimension but the first, where there are several.
Tensor tail(const Tensor& t, int64_t dimension) {
  const auto size = t.size(dimension);
  return size == 1 ? t : t.narrow(dimension, 1, size - 1);
}

struct View {
  const char* name;
  int64_t dimensions;  // of the weights that have it, at least
  std::function<Tensor(const Tensor& weight)> of;
};

const std::vector<View> kViews{
    {"the whole", 0, [](const Tensor& w) { return w; }},
    {"an alias", 0, [](const Tensor& w) { return w.alias(); }},
    {"detached", 0, [](const Tensor& w) { return w.detach(); }},
    {"t", 2, [](const Tensor& w) { return w.transpose(0, 1); }},
    {"t twice", 2, [](const Tensor& w) { return w.transpose(0, 1).transpose(0, 1); }},
    {"transposed at the end", 2, [](const Tensor& w) { return w.transpose(-1, -2); }},
    {"the last dimension first", 1, [](const Tensor& w) { return w.movedim(-1, 0); }},
    {"rows from the second on", 1, [](const Tensor& w) { return tail(w, 0); }},
    {"the first row", 1, [](const Tensor& w) { return w.narrow(0, 0, 1); }},
    {"the last row", 1, [](const Tensor& w) { return w.narrow(0, w.size(0) - 1, 1); }},
    {"rows, transposed", 2, [](const Tensor& w) { return tail(w, 0).transpose(0, 1); }},
    {"the last row, transposed", 2, [](const Tensor& w) { return w.narrow(0, w.size(0) - 1, 1).transpose(0, 1); }},
    {"rows of rows", 1, [](const Tensor& w) { return tail(tail(w, 0), 0); }},
    {"rows after transposing", 2, [](const Tensor& w) { return tail(w.transpose(0, 1), 1); }},
    {"columns", 2, [](const Tensor& w) { return tail(w, 1); }},
    {"the last column", 2, [](const Tensor& w) { return w.narrow(1, w.size(1) - 1, 1); }},
    {"columns, transposed", 2, [](const Tensor& w) { return tail(w, 1).transpose(0, 1); }},
    {"a block", 2, [](const Tensor& w) { return tail(tail(w, 0), 1); }},
    {"a block at the end", 1, [](const Tensor& w) { return tail(tail(w, -1), 0); }},
    {"a block, transposed", 2, [](const Tensor& w) { return tail(tail(w, 0), 1).transpose(0, 1); }},
    {"one row, selected", 1, [](const Tensor& w) { return w.select(0, w.size(0) - 1); }},
    {"one column, selected", 2, [](const Tensor& w) { return w.select(1, w.size(1) - 1); }},
    {"one number, selected", 2, [](const Tensor& w) { return w.select(1, w.size(1) - 1).select(0, w.size(0) - 1); }},
    {"the last chunk", 1, [](const Tensor& w) { return w.chunk(2).back(); }},
    {"the last chunk of columns", 2, [](const Tensor& w) { return w.chunk(3, 1).back(); }},
    {"split", 1, [](const Tensor& w) { return w.split(1, 0).back(); }},
    {"every second row", 1, [](const Tensor& w) { return w.slice(0, 0, w.size(0), 2); }},
    {"every second column", 2, [](const Tensor& w) { return w.slice(1, 0, w.size(1), 2); }},
    {"unsqueezed in front", 0, [](const Tensor& w) { return w.unsqueeze(0); }},
    {"unsqueezed at the end", 0, [](const Tensor& w) { return w.unsqueeze(-1); }},
    {"squeezed", 0, [](const Tensor& w) { return w.squeeze(); }},
    {"unsqueezed and expanded", 0,
     [](const Tensor& w) {
       auto sizes = w.sizes().vec();
       sizes.insert(sizes.begin(), 3);
       return w.expand(sizes);
     }},
    {"one row, expanded", 2, [](const Tensor& w) { return w.narrow(0, w.size(0) - 1, 1).expand_as(w); }},
    {"transposed, expanded", 2,
     [](const Tensor& w) {
       const auto t = w.transpose(0, 1).unsqueeze(0);
       auto sizes = t.sizes().vec();
       sizes[0] = 2;
       return t.expand(sizes);
     }},
    {"flat", 0, [](const Tensor& w) { return w.reshape(-1); }},
    {"flat but for the rows", 1,
     [](const Tensor& w) {
       return w.reshape({w.size(0), -1});
     }},
    {"flat after transposing", 2, [](const Tensor& w) { return w.transpose(0, 1).reshape(-1); }},
    {"flat rows", 1, [](const Tensor& w) { return tail(w, 0).reshape(-1); }},
    {"in pairs", 1,
     [](const Tensor& w) {
       return w.size(-1) % 2 == 0 ? w.unflatten(-1, at::IntArrayRef{-1, 2}) : w;
     }},
    {"heads", 1,
     [](const Tensor& w) {
       return w.size(0) % 2 == 0 ? w.unflatten(0, at::IntArrayRef{2, -1}) : w;
     }},
    {"the second head", 1,
     [](const Tensor& w) {
       return w.size(0) % 2 == 0 ? w.unflatten(0, at::IntArrayRef{2, -1})[1] : w;
     }},
    {"heads, transposed", 1,
     [](const Tensor& w) {
       return w.size(0) % 2 == 0 ? w.unflatten(0, at::IntArrayRef{2, -1}).transpose(0, -1) : w;
     }},
    {"another shape", 2,
     [](const Tensor& w) {
       return w.reshape({w.size(1), w.size(0), -1});
     }},
    {"the diagonal", 2, [](const Tensor& w) { return w.diagonal(); }},
    {"a diagonal beside it", 2, [](const Tensor& w) { return w.size(1) > 1 ? w.diagonal(1) : w; }},
    {"windows", 1, [](const Tensor& w) { return w.unfold(-1, std::min<int64_t>(2, w.size(-1)), 1); }},
    {"windows of rows", 1, [](const Tensor& w) { return w.unfold(0, std::min<int64_t>(2, w.size(0)), 1); }},
    {"as_strided, the same", 0, [](const Tensor& w) { return w.as_strided(w.sizes(), w.strides()); }},
    {"as_strided, two numbers", 1,
     [](const Tensor& w) { return w.size(0) == 1 ? w : w.as_strided({2}, {w.stride(0)}, w.storage_offset()); }},
    {"as_strided, one number often", 0,
     [](const Tensor& w) {
       return w.as_strided({2, 3}, {0, 0}, w.storage_offset());
     }},
};

/// Calls `check(weight, view, operand)` for every view of every weight.
void for_every_view(const std::function<void(const Tensor& weight, const View& view, const Tensor& operand)>& check) {
  for (const auto& [name, make] : kWeights) {
    const auto weight = make();
    for (const auto& view : kViews) {
      if (view.dimensions > weight.dim()) continue;
      INFO(view.name << " of " << name);
      const auto operand = view.of(weight);
      if (operand.is_alias_of(weight)) check(weight, view, operand);  // and no copy, as some reshaped ones are
    }
  }
}

/// The first rows of a matrix that an operand consists of, and how many, tried one by one; for transposed rows, too.
std::vector<Part> rows_by_trial(const Tensor& weight, const Tensor& operand) {
  std::vector<Part> found;
  for (int64_t first = 0; first < weight.size(0); ++first) {
    for (int64_t count = 1; first + count <= weight.size(0); ++count) {
      const auto rows = weight.narrow(0, first, count);
      if (torch::equal(rows, operand)) found.push_back({Part::Kind::kRows, first, count});
      if (torch::equal(rows.t(), operand)) found.push_back({Part::Kind::kTransposedRows, first, count});
    }
  }
  return found;
}

}  // namespace

TEST_CASE("Every view of a weight is a part of it, and the same part of other numbers is the same view of these") {
  torch::manual_seed(0);
  int count = 0;
  for_every_view([&](const Tensor& weight, const View& view, const Tensor& operand) {
    ++count;
    const auto part = lora::detail::part_of(weight, operand);
    REQUIRE(part);
    const auto alike = laid_out_alike(weight), expected = view.of(alike);
    const auto in_larger = torch::stack({alike, -alike, alike}, 0)[2];
    for (const auto& whole : {alike, alike.contiguous(), in_larger, alike.to(torch::kFloat).to(torch::kDouble)})
      CHECK(testing::distance(lora::detail::same_part(whole, weight, operand, *part), expected) < 1e-6);
    CHECK(torch::equal(lora::detail::same_part(alike, weight, operand, *part), expected));
    CHECK(torch::equal(lora::detail::same_part(in_larger, weight, operand, *part), expected));
  });
  CHECK(count > 1000);
}

TEST_CASE("Rows of a matrix, and rows that are transposed, are found wherever an operand consists of them") {
  for_every_view([&](const Tensor& weight, const View&, const Tensor& operand) {
    const auto part = lora::detail::part_of(weight, operand);
    REQUIRE(part);
    if (operand.is_same(weight)) {
      CHECK(part->kind == Part::Kind::kRows);
      CHECK(part->count == (weight.dim() == 0 ? 1 : weight.size(0)));
    }
    if (weight.dim() != 2) return;
    const auto by_trial = rows_by_trial(weight, operand);
    const auto is_it = [&](const Part& other) {
      return other.kind == part->kind && other.first == part->first && other.count == part->count;
    };
    CHECK((part->kind == Part::Kind::kOther ? by_trial.empty() : std::any_of(by_trial.begin(), by_trial.end(), is_it)));
  });
}

TEST_CASE("Gradients pass through a part as through the view") {
  torch::manual_seed(0);
  for_every_view([&](const Tensor& weight, const View& view, const Tensor& operand) {
    const auto part = lora::detail::part_of(weight, operand);
    REQUIRE(part);
    if (std::string(view.name) == "detached") return;
    const auto whole = torch::randn(weight.sizes(), weight.options()).requires_grad_();
    const auto factor = torch::randn(operand.sizes(), weight.options());
    const auto gradient_of = [&](const Tensor& value) {
      return torch::autograd::grad({(value * factor).sin().sum()}, {whole})[0];
    };
    const auto by_hand = laid_out_alike(weight).zero_();
    CHECK(testing::distance(gradient_of(lora::detail::same_part(whole, weight, operand, *part)),
                            gradient_of(view.of(by_hand.clone(at::MemoryFormat::Preserve).copy_(whole)))) < 1e-12);
  });
}

TEST_CASE("What lies beside a weight, before it or behind it is no part of it") {
  const auto packed = counted({6, 8}), flat = memory(48);
  const auto rows = packed.narrow(0, 2, 2), columns = packed.narrow(1, 2, 3), block = rows.narrow(1, 2, 3);
  const auto kernels = counted({2, 6, 3}), channels = kernels.narrow(1, 2, 2);
  const auto [name, weight, operand] = GENERATE_REF(table<const char*, Tensor, Tensor>({
      {"rows before", rows, packed.narrow(0, 0, 2)},
      {"rows behind", rows, packed.narrow(0, 4, 2)},
      {"rows behind, transposed", rows, packed.narrow(0, 4, 2).t()},
      {"columns before", columns, packed.narrow(1, 0, 2)},
      {"columns behind", columns, packed.narrow(1, 5, 3)},
      {"columns behind, transposed", columns, packed.narrow(1, 5, 3).t()},
      {"one column", columns, packed.select(1, 7)},
      {"a row of the columns behind", columns, packed.narrow(1, 5, 3)[4]},
      {"columns of a transposed weight", columns.t(), packed.narrow(1, 5, 3)},
      {"beside a block", block, packed.narrow(0, 2, 2).narrow(1, 5, 3)},
      {"above a block", block, packed.narrow(0, 0, 2).narrow(1, 2, 3)},
      {"other channels", channels, kernels.narrow(1, 4, 2)},
      {"other channels, flat", channels, kernels.narrow(1, 4, 2).reshape({2, 6})},
      {"the next weight in a flat memory", flat.narrow(0, 0, 12).view({3, 4}), flat.narrow(0, 12, 12).view({3, 4})},
      {"the one before", flat.narrow(0, 12, 12).view({3, 4}), flat.narrow(0, 0, 12).view({4, 3}).t()},
      {"nothing of it", rows, rows.narrow(0, 1, 0)},
      {"no columns of it", rows, rows.narrow(1, 3, 0)},
      {"another type", rows, rows.view(torch::kLong)},
  }));
  INFO(name);
  CHECK_FALSE(lora::detail::part_of(weight, operand));
  CHECK_FALSE(lora::detail::may_overlap(weight, operand));
}

TEST_CASE("What has numbers of a weight and others is no part of it, but not apart from it either") {
  const auto packed = counted({6, 8});
  const auto rows = packed.narrow(0, 2, 2), columns = packed.narrow(1, 2, 3);
  const auto [name, weight, operand] = GENERATE_REF(table<const char*, Tensor, Tensor>({
      {"what the rows are packed in", rows, packed},
      {"the same transposed", rows, packed.t()},
      {"flat", rows, packed.view(-1)},
      {"one row more", rows, packed.narrow(0, 2, 3)},
      {"one row before", rows, packed.narrow(0, 1, 2)},
      {"a column through all rows", rows, packed.select(1, 3)},
      {"what the columns are packed in", columns, packed},
      {"one column more", columns, packed.narrow(1, 2, 4)},
      {"one column before, transposed", columns, packed.narrow(1, 1, 2).t()},
      {"a whole row", columns, packed[3]},
      {"the diagonal", columns, packed.diagonal()},
      {"seven apart", columns, packed.as_strided({6}, {7}, 2)},
  }));
  INFO(name);
  CHECK_FALSE(lora::detail::part_of(weight, operand));
  CHECK(lora::detail::may_overlap(weight, operand));
}

TEST_CASE("Weights and operands that are cut at random out of one memory agree with the places that they have") {
  torch::manual_seed(0);
  const auto number = [](int64_t end) { return torch::randint(end, {1}).item<int64_t>(); };
  const auto cut = [&](Tensor tensor) {
    for (int64_t steps = number(4); steps > 0; --steps) {
      const auto dimension = number(tensor.dim()), size = tensor.size(dimension), first = number(size);
      switch (number(4)) {
        case 0:
          tensor = tensor.narrow(dimension, first, 1 + number(size - first));
          break;
        case 1:
          tensor = tensor.slice(dimension, first, size, 1 + number(2));
          break;
        case 2:
          tensor = tensor.transpose(dimension, number(tensor.dim()));
          break;
        default:
          tensor = tensor.dim() > 1 ? tensor.select(dimension, first) : tensor.unsqueeze(0);
      }
    }
    return tensor;
  };
  const auto all = counted({3, 4, 5});
  int parts = 0, overlapping = 0, apart = 0;
  for (int i = 0; i < 5000; ++i) {
    const auto weight = cut(all), operand = cut(number(2) == 0 ? weight : all);
    const auto inner = places_of(operand), outer = places_of(weight);
    std::set<double> common;
    std::set_intersection(inner.begin(), inner.end(), outer.begin(), outer.end(), std::inserter(common, common.end()));
    INFO("weight " << weight.sizes() << weight.strides() << weight.storage_offset() << ", operand " << operand.sizes()
                   << operand.strides() << operand.storage_offset());
    const auto part = lora::detail::part_of(weight, operand);
    if (common == inner) {
      ++parts;
      REQUIRE(part);
      REQUIRE(torch::equal(lora::detail::same_part(weight.contiguous(), weight, operand, *part), operand));
    } else {
      REQUIRE_FALSE(part);
      ++(common.empty() ? apart : overlapping);
      if (!common.empty()) REQUIRE(lora::detail::may_overlap(weight, operand));
    }
  }
  CHECK(std::min({parts, overlapping, apart}) > 100);
}

TEST_CASE("Blocks begin where they begin, and rows are counted from the first") {
  const auto weight = counted({4, 6}), packed = counted({4, 12}).narrow(1, 6, 6);
  using Start = std::optional<Sizes>;
  for (const auto& w : {weight, packed, counted({6, 4}).t()}) {
    CHECK(lora::detail::block_start(w, w) == Start({0, 0}));
    CHECK(lora::detail::block_start(w, w.narrow(0, 1, 2).narrow(1, 3, 2)) == Start({1, 3}));
    CHECK(lora::detail::block_start(w, w.narrow(0, 3, 1).narrow(1, 5, 1)) == Start({3, 5}));
    CHECK(lora::detail::block_start(w, w.t()) == std::nullopt);
    CHECK(lora::detail::block_start(w, w[0]) == std::nullopt);
  }
  CHECK(lora::detail::row_block(weight, 6, 2, 6, 6, 1) == std::optional(std::pair<int64_t, int64_t>(1, 2)));
  CHECK_FALSE(lora::detail::row_block(weight, 7, 2, 6, 6, 1));   // begins in the middle of a row
  CHECK_FALSE(lora::detail::row_block(weight, 18, 2, 6, 6, 1));  // ends behind the last
  CHECK_FALSE(lora::detail::row_block(weight, 6, 2, 5, 6, 1));   // not whole rows
  CHECK_FALSE(lora::detail::row_block(weight, 6, 2, 6, 12, 1));  // every second
}
