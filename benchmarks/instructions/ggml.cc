// ggml stored|repacked ROWS COLUMNS TOKENS REPEATS: mul_mat of Q4_0 weights as llama.cpp's CPU backend computes it, on one
// thread, so many times as nodes of one graph; prints the error. Repacked: in the buffer that llama.cpp chooses for them.
#include <ggml-alloc.h>
#include <ggml-backend.h>
#include <ggml-cpu.h>

#include <cstring>
#include <stdexcept>

#include "product.h"

static ggml_backend_buffer_type_t buffer_type(ggml_backend_t backend, bool repacked) {
  if (!repacked) return ggml_backend_get_default_buffer_type(backend);
  ggml_backend_dev_t device = ggml_backend_get_device(backend);
  const auto extra = reinterpret_cast<ggml_backend_dev_get_extra_bufts_t>(
      ggml_backend_reg_get_proc_address(ggml_backend_dev_backend_reg(device), "ggml_backend_dev_get_extra_bufts"));
  if (extra == nullptr || extra(device)[0] == nullptr) throw std::runtime_error("the backend repacks nothing");
  return extra(device)[0];
}

int main(int count, char** words) {
  if (count != 6) return 2;
  const Sizes sizes = sizes_of(words + 2);
  const auto rows = static_cast<int64_t>(sizes.rows), columns = static_cast<int64_t>(sizes.columns);
  const size_t memory =
      ggml_tensor_overhead() * (sizes.repeats + 2) + ggml_graph_overhead_custom(sizes.repeats + 2, false);
  ggml_context* const of_weights = ggml_init({ggml_tensor_overhead() * 2, nullptr, true});
  ggml_context* const context = ggml_init({memory, nullptr, true});
  ggml_tensor* const w = ggml_new_tensor_2d(of_weights, GGML_TYPE_Q4_0, columns, rows);
  ggml_tensor* const x = ggml_new_tensor_2d(context, GGML_TYPE_F32, columns, static_cast<int64_t>(sizes.tokens));
  ggml_cgraph* const graph = ggml_new_graph_custom(context, sizes.repeats + 2, false);
  ggml_tensor* y = nullptr;
  for (size_t i = 0; i < sizes.repeats; ++i) ggml_build_forward_expand(graph, y = ggml_mul_mat(context, w, x));

  ggml_backend_t backend = ggml_backend_cpu_init();
  ggml_backend_cpu_set_n_threads(backend, 1);
  ggml_backend_alloc_ctx_tensors_from_buft(of_weights, buffer_type(backend, std::strcmp(words[1], "repacked") == 0));
  ggml_backend_alloc_ctx_tensors(context, backend);
  const std::vector<float> values = normal(sizes.rows * sizes.columns, 1),
                           of_x = normal(sizes.tokens * sizes.columns, 2);
  std::vector<uint8_t> blocks(ggml_nbytes(w));
  ggml_quantize_chunk(GGML_TYPE_Q4_0, values.data(), blocks.data(), 0, rows, columns, nullptr);
  ggml_backend_tensor_set(w, blocks.data(), 0, blocks.size());
  ggml_backend_tensor_set(x, of_x.data(), 0, ggml_nbytes(x));
  if (ggml_backend_graph_compute(backend, graph) != GGML_STATUS_SUCCESS) return 1;
  std::vector<float> of_y(sizes.tokens * sizes.rows), of_weight(blocks.size() / 18 * 32);
  ggml_backend_tensor_get(y, of_y.data(), 0, ggml_nbytes(y));
  ggml_get_type_traits(GGML_TYPE_Q4_0)->to_float(blocks.data(), of_weight.data(), rows * columns);
  print_error(sizes, of_x.data(), of_y.data(),
              [&](size_t row, size_t k) { return static_cast<double>(of_weight[row * sizes.columns + k]); });
}
