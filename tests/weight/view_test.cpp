// How the weight of each kind of layer is a matrix, and back: one table, and index arithmetic written out beside it.
#include "support/testing.hpp"

#include <lora/weight/view.hpp>

namespace {

using lora::MatrixView;
using torch::Tensor;
using Sizes = std::vector<int64_t>;

constexpr int64_t kNowhere = -1;  // an entry of the matrix that is no entry of the weight

/// Where entry (g, o, i) of a batch of matrices (out, in) lies in the weight, counted row by row.
using Place = std::function<int64_t(const lora::MatrixShape& shape, int64_t g, int64_t o, int64_t i)>;

/// Matrix after matrix, row after row.
int64_t straight(const lora::MatrixShape& shape, int64_t g, int64_t o, int64_t i) {
  return (g * shape.out + o) * shape.in + i;
}

/// Each matrix with its inputs as rows, and of each input and output `kernel` numbers beside each other.
template <int64_t kernel>
int64_t crossed(const lora::MatrixShape& shape, int64_t g, int64_t o, int64_t i) {
  return (g * shape.in / kernel + i / kernel) * shape.out * kernel + o * kernel + i % kernel;
}

/// Of parts that begin at some rows of a weight and have as many rows.
Place below_each_other(const Sizes& first, const Sizes& rows) {
  return [=](const lora::MatrixShape& shape, int64_t g, int64_t o, int64_t i) {
    const auto part = static_cast<size_t>(g);
    return o < rows[part] ? (first[part] + o) * shape.in + i : kNowhere;
  };
}

struct View {
  const char* name;
  MatrixView view;
  Sizes sizes;              // of the weight
  lora::MatrixShape shape;  // batch, out, in, shares of the rank, whether it is a lookup
  Place place;
};

MatrixView parts(const std::vector<bool>& chosen) { return MatrixView::parts({6, 2}, {3, 1, 2}, chosen); }

const std::vector<View>& views() {
  static const std::vector<View> all{
      {"plain", MatrixView::plain({2, 3}), {2, 3}, {{}, 2, 3}, straight},
      {"plain, square", MatrixView::plain({3, 3}), {3, 3}, {{}, 3, 3}, straight},
      {"plain, a batch", MatrixView::plain({4, 2, 3}), {4, 2, 3}, {{4}, 2, 3}, straight},
      {"transposed", MatrixView::transposed({3, 2}), {3, 2}, {{}, 2, 3}, crossed<1>},
      {"transposed, square", MatrixView::transposed({3, 3}), {3, 3}, {{}, 3, 3}, crossed<1>},
      {"transposed, a batch", MatrixView::transposed({4, 3, 2}), {4, 3, 2}, {{4}, 2, 3}, crossed<1>},
      {"lookup", MatrixView::lookup({5, 3}), {5, 3}, {{}, 3, 5, 1, true}, crossed<1>},
      {"rows, 2 dimensions", MatrixView::rows({2, 3}), {2, 3}, {{}, 2, 3}, straight},
      {"rows, 3 dimensions", MatrixView::rows({2, 3, 4}), {2, 3, 4}, {{}, 2, 12}, straight},
      {"kernel, 1 dimension", MatrixView::kernel({4, 3, 5}, 1, false), {4, 3, 5}, {{}, 4, 15}, straight},
      {"kernel, 2 dimensions", MatrixView::kernel({4, 3, 2, 5}, 1, false), {4, 3, 2, 5}, {{}, 4, 30}, straight},
      {"kernel, 2 groups", MatrixView::kernel({4, 3, 5}, 2, false), {4, 3, 5}, {{2}, 2, 15, 2}, straight},
      {"kernel, each channel", MatrixView::kernel({4, 1, 2, 3}, 4, false), {4, 1, 2, 3}, {{4}, 1, 6, 4}, straight},
      {"transposed kernel", MatrixView::kernel({4, 3, 5}, 1, true), {4, 3, 5}, {{}, 3, 20}, crossed<5>},
      {"transposed, 2 groups", MatrixView::kernel({4, 3, 5}, 2, true), {4, 3, 5}, {{2}, 3, 10, 2}, crossed<5>},
      {"transposed, 3 groups", MatrixView::kernel({6, 2, 2, 2}, 3, true), {6, 2, 2, 2}, {{3}, 2, 8, 3}, crossed<4>},
      {"parts, all", parts({true, true, true}), {6, 2}, {{3}, 3, 2}, below_each_other({0, 3, 4}, {3, 1, 2})},
      {"parts, two", parts({true, false, true}), {6, 2}, {{2}, 3, 2}, below_each_other({0, 4}, {3, 2})},
      {"parts, smallest", parts({false, true, false}), {6, 2}, {{1}, 3, 2}, below_each_other({3}, {1})},
  };
  return all;
}

/// Numbers 1, 2, 3, ... of some sizes.
Tensor counted(const Sizes& sizes) {
  return torch::arange(1, c10::multiply_integers(sizes) + 1, testing::on_device(torch::kDouble)).view(sizes);
}

/// Calls `visit(place)` for every entry of the matrix, row by row.
void for_each_place(const View& row, const std::function<void(int64_t)>& visit) {
  for (int64_t g = 0; g < (row.shape.batch.empty() ? 1 : row.shape.batch[0]); ++g) {
    for (int64_t o = 0; o < row.shape.out; ++o) {
      for (int64_t i = 0; i < row.shape.in; ++i) visit(row.place(row.shape, g, o, i));
    }
  }
}

/// The matrix of `counted`, entry by entry; zero where the weight has none.
Tensor expected_matrix(const View& row) {
  std::vector<double> values;
  for_each_place(row, [&](int64_t place) { values.push_back(static_cast<double>(place + 1)); });
  auto sizes = row.shape.batch;
  sizes.append({row.shape.out, row.shape.in});
  return torch::tensor(values, torch::kDouble).view(sizes).to(testing::device());
}

/// 1 for the entries of the weight that are in the matrix, else 0.
Tensor covered(const View& row) {
  std::vector<double> entries(static_cast<size_t>(c10::multiply_integers(row.sizes)));
  for_each_place(row, [&](int64_t place) {
    if (place != kNowhere) entries[static_cast<size_t>(place)] = 1;
  });
  return torch::tensor(entries, torch::kDouble).view(row.sizes).to(testing::device());
}

/// The same values, laid out in memory in other ways.
struct Layout {
  const char* name;
  Tensor (*of)(const Tensor& tensor);
};

const std::vector<Layout> kLayouts{
    {"contiguous", [](const Tensor& t) { return t.contiguous(); }},
    {"last dimension first", [](const Tensor& t) { return t.transpose(0, -1).contiguous().transpose(0, -1); }},
    {"every second number",
     [](const Tensor& t) {
       return torch::stack({t, -t}, -1).select(-1, 0);
     }},
    {"in the middle of a larger tensor",
     [](const Tensor& t) {
       return torch::cat({-t, t, -t}, 1).narrow(1, t.size(1), t.size(1));
     }},
};

const View& any_view() { return views()[GENERATE(range(size_t{0}, views().size()))]; }

}  // namespace

TEST_CASE("A method is told the shape of the matrix") {
  for (const auto& row : views()) {
    INFO(row.name);
    CHECK(row.view.shape().batch == row.shape.batch);
    CHECK(row.view.shape().out == row.shape.out);
    CHECK(row.view.shape().in == row.shape.in);
    CHECK(row.view.shape().rank_shares == row.shape.rank_shares);
    CHECK(row.view.shape().is_lookup == row.shape.is_lookup);
  }
}

TEST_CASE("Every entry of the matrix is the one of the weight that it should be, however the weight lies in memory") {
  const auto& row = any_view();
  const auto weight = counted(row.sizes);
  for (const auto& layout : kLayouts) {
    INFO(row.name << ", " << layout.name);
    CHECK(torch::equal(row.view.matrix(layout.of(weight)), expected_matrix(row)));
  }
}

TEST_CASE("The matrix gives the weight back, with zeros in the parts that are not chosen") {
  const auto& row = any_view();
  const auto weight = counted(row.sizes), matrix = expected_matrix(row);
  CHECK(torch::equal(row.view.weight(row.view.matrix(weight)), weight * covered(row)));
  for (const auto& layout : kLayouts) {
    INFO(row.name << ", " << layout.name);
    CHECK(torch::equal(row.view.weight(layout.of(matrix)), weight * covered(row)));
  }
}

TEST_CASE("A matrix that became a weight is the same matrix again, apart from what fills up the smaller parts") {
  torch::manual_seed(0);
  const auto& row = any_view();
  INFO(row.name);
  const auto is_entry = expected_matrix(row) > 0;
  const auto matrix = torch::randn(is_entry.sizes(), testing::on_device(torch::kDouble));
  CHECK(torch::equal(row.view.matrix(row.view.weight(matrix)), matrix * is_entry));
}

TEST_CASE("Gradients flow through a view both ways") {
  torch::manual_seed(0);
  const auto& row = any_view();
  const auto random = [](at::IntArrayRef sizes) { return torch::randn(sizes, testing::on_device(torch::kDouble)); };
  const auto weight = random(row.sizes).requires_grad_();
  const auto matrix = random(expected_matrix(row).sizes()).requires_grad_();
  const auto of_matrix = random(matrix.sizes()), of_weight = random(weight.sizes());
  for (const auto& layout : kLayouts) {
    INFO(row.name << ", " << layout.name);
    CHECK(testing::gradient_error([&] { return (row.view.matrix(layout.of(weight)) * of_matrix).sin().sum(); },
                                  {weight}) < 1e-8);
    CHECK(testing::gradient_error([&] { return (row.view.weight(layout.of(matrix)) * of_weight).sin().sum(); },
                                  {matrix}) < 1e-8);
  }
}

TEST_CASE("A plain weight is its own matrix, and no view of a contiguous weight copies it that need not") {
  const auto weight = counted({2, 3});
  CHECK(MatrixView::plain({2, 3}).matrix(weight).is_same(weight));
  CHECK(MatrixView::plain({2, 3}).weight(weight).is_same(weight));
  const auto kernel = counted({4, 3, 5});
  for (const auto& view : {MatrixView::rows({4, 3, 5}), MatrixView::kernel({4, 3, 5}, 1, false),
                           MatrixView::kernel({4, 3, 5}, 2, false), MatrixView::transposed({4, 3, 5})}) {
    CHECK(view.matrix(kernel).is_alias_of(kernel));
  }
}

TEST_CASE("By hand: the groups of a transposed convolution, and parts of a weight") {
  // (in 2, out / groups 2, kernel 2): group 0 has the first input, group 1 the second
  const auto kernel = torch::tensor({1, 2, 3, 4, 5, 6, 7, 8}, testing::device()).view({2, 2, 2});
  CHECK(torch::equal(MatrixView::kernel({2, 2, 2}, 2, true).matrix(kernel),
                     torch::tensor({{{1, 2}, {3, 4}}, {{5, 6}, {7, 8}}}, testing::device())));
  CHECK(torch::equal(MatrixView::kernel({2, 2, 2}, 1, true).matrix(kernel),
                     torch::tensor({{1, 2, 5, 6}, {3, 4, 7, 8}}, testing::device())));

  const auto packed = torch::tensor({{1, 2}, {3, 4}, {5, 6}, {7, 8}}, testing::device());
  const auto view = MatrixView::parts({4, 2}, {1, 2, 1}, {true, true, false});
  CHECK(torch::equal(view.matrix(packed), torch::tensor({{{1, 2}, {0, 0}}, {{3, 4}, {5, 6}}}, testing::device())));
  CHECK(torch::equal(view.weight(torch::tensor({{{1, 2}, {9, 9}}, {{3, 4}, {5, 6}}}, testing::device())),
                     torch::tensor({{1, 2}, {3, 4}, {5, 6}, {0, 0}}, testing::device())));
}

TEST_CASE("Parts say which they are; other views have none") {
  const auto view = MatrixView::parts({6, 2}, {3, 1, 2}, {true, false, true});
  CHECK(view.part_rows() == Sizes{3, 1, 2});
  CHECK(view.chosen_parts() == std::vector<bool>{true, false, true});
  for (const auto& row : views()) {
    const bool has_parts = std::string(row.name).rfind("parts", 0) == 0;
    CHECK(row.view.part_rows().empty() != has_parts);
    CHECK(row.view.chosen_parts().empty() != has_parts);
  }
}
