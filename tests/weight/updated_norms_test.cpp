#include "support/testing.hpp"

#include <lora/weight/thin_kernels.hpp>
#include <lora/weight/updated_norms.hpp>

TEST_CASE("The norms of the rows of W + s B A, without that") {
  torch::manual_seed(0);
  struct Sizes {
    int64_t out, in, rank;
  };
  for (const auto& [out, in, rank] :
       std::vector<Sizes>{{1, 1, 1}, {5, 7, 2}, {6, 40, 4}, {33, 129, 11}, {64, 96, 70}}) {
    for (const auto type : {torch::kFloat, torch::kDouble}) {
      INFO(out << " x " << in << ", rank " << rank << ", " << type);
      const auto random = [&, type = type](at::IntArrayRef sizes) {
        return torch::randn(sizes, testing::on_device(torch::kFloat)).to(type);
      };
      const auto A = random({rank, in}), B = random({out, rank});
      for (const auto& W : {random({out, in}), random({in, out}).t()}) {
        const auto exact = (W.to(torch::kDouble) - 1.5 * B.to(torch::kDouble).mm(A.to(torch::kDouble))).norm(2, 1);
        const bool in_one_pass = type == torch::kFloat && W.is_contiguous() && rank <= 64 && testing::device().is_cpu();
        CHECK(lora::detail::is_for_norms_by_rows(W, A, B) == (in_one_pass && lora::detail::has_avx2()));
        for (const bool by_thin_kernels : {false, true}) {
          lora::detail::take_thin_kernels(by_thin_kernels);
          const auto norms = lora::detail::updated_norms(W, A, B, -1.5);
          CHECK(norms.scalar_type() == type);
          CHECK(testing::distance(norms, exact) < (type == torch::kFloat ? 1e-4 : 1e-12) * exact.max().item<double>());
        }
      }
    }
  }
}

TEST_CASE("The norms of each matrix of a batch") {
  torch::manual_seed(0);
  const auto type = testing::on_device(torch::kDouble);
  const auto W = torch::randn({3, 5, 7}, type), A = torch::randn({3, 2, 7}, type), B = torch::randn({3, 5, 2}, type);
  CHECK(testing::distance(lora::detail::updated_norms(W, A, B, 0.75), (W + 0.75 * B.matmul(A)).norm(2, -1)) < 1e-12);
}

TEST_CASE("A row that an update cancels has no norm, not less than none") {
  const auto W = torch::randn({4, 48}, testing::on_device(torch::kFloat));
  const auto B = torch::eye(4, W.options());
  CHECK(lora::detail::updated_norms(W, W, B, -1).max().item<double>() < 1e-2);
}
