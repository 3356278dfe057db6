#include "nodes.h"

#include <algorithm>
#include <cstring>
#include <limits>

namespace {

using host::Node;
using host::Tensor;
using Shape = std::vector<int64_t>;

constexpr ONNXTensorElementDataType kFloat = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
constexpr ONNXTensorElementDataType kHalf = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16;
constexpr ONNXTensorElementDataType kByte = ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8;
constexpr ONNXTensorElementDataType kSignedByte = ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8;
constexpr ONNXTensorElementDataType kInteger = ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64;
constexpr int64_t kMostInput = 1 << 20;  // elements of an input that was changed

void fill(Choice& choice, Tensor& tensor, int64_t count) {
  tensor.memory.resize(static_cast<size_t>(count) * host::width_of(tensor.type) + tensor.shift);
  // one draw for the tensor, so that a fuzzer's bytes are left for its shape
  std::minstd_rand numbers(static_cast<unsigned>(choice.below(1 << 16)) + 1);
  const int64_t special = choice.one_in(8) ? choice.of({1, 2, 3, 4}) : 0;
  for (int64_t i = 0; i < count; ++i) {
    char* const at = tensor.memory.data() + tensor.shift + static_cast<size_t>(i) * host::width_of(tensor.type);
    const auto number = static_cast<uint32_t>(numbers());
    if (tensor.type == kFloat) {
      float value = static_cast<float>(number % 2001) / 1000 - 1;
      if (special == 1 && number % 5 == 0) value = std::numeric_limits<float>::quiet_NaN();
      if (special == 2 && number % 5 == 0) value = -std::numeric_limits<float>::infinity();
      if (special == 3) value *= 1e38f;
      if (special == 4) value *= 1e-40f;
      std::memcpy(at, &value, sizeof value);
    } else if (tensor.type == kInteger) {
      const int64_t value = number % 4 != 0 ? 1 : special == 1 ? INT64_MIN : 0;
      std::memcpy(at, &value, sizeof value);
    } else if (tensor.type == kHalf) {
      const auto bits = static_cast<uint16_t>(special != 0 ? number >> 8 : 0x2000 + number % 0x800);
      std::memcpy(at, &bits, sizeof bits);
    } else {
      std::fill_n(at, host::width_of(tensor.type), static_cast<char>(number >> 8));
    }
  }
}

void add(Choice& choice, Node& node, Shape shape, ONNXTensorElementDataType type = kFloat, bool given = true) {
  Tensor tensor{.type = type, .shape = std::move(shape), .memory = {}, .shift = 0};
  fill(choice, tensor, host::elements(tensor.shape, std::numeric_limits<int32_t>::max()));
  node.inputs.push_back(std::move(tensor));
  node.given.push_back(given);
}

int64_t rows_of(Choice& choice) { return choice.of({1, 1, 2, 3, 5, 9, 17, 40, 0}); }

// Weights [N, K] behind the other inputs.
void add_weights(Choice& choice, Node& node, int64_t columns) {
  const int64_t rows = choice.of({1, 2, 3, 8, 15, 16, 17, 33}), bits = choice.of({4, 8});
  const int64_t block = choice.of({16, 32, 64, 128}), blocks = (columns + block - 1) / block;
  node.integers.insert({{"K", columns}, {"N", rows}, {"bits", bits}, {"block_size", block}});
  node.integers["accuracy_level"] = choice.of({0, 4});
  add(choice, node, {rows, blocks, block * bits / 8}, kByte);
  add(choice, node, {rows, blocks}, kHalf);
  add(choice, node, {rows}, kFloat, !choice.one_in(2));
  add(choice, node, {rows}, kFloat, !choice.one_in(2));
}

int64_t columns_of(Choice& choice) { return choice.of({1, 7, 16, 32, 48, 64, 96, 130, 160, 257, 512}); }

Node product(Choice& choice) {
  Node node;
  const int64_t batch = choice.of({1, 2}), tokens = rows_of(choice), columns = columns_of(choice);
  const int64_t spare = choice.of({0, 1, 5, 8}), offset = choice.of({0, spare});
  switch (choice.below(4)) {
    case 0:
      node.op = "QMatMul";
      add(choice, node, {batch, tokens, columns});
      break;
    case 1:
      node.op = "NormQMatMul";
      node.outputs = 2;
      node.reals["epsilon"] = 1e-5f;
      for (int i = 0; i < 2; ++i) add(choice, node, {batch, tokens, columns});
      add(choice, node, {columns});
      break;
    case 2: {
      node.op = "PairQMatMul";
      node.reals.insert({{"a_factor", choice.real()}, {"b_factor", choice.real()}});
      const int64_t left = columns / 2 + 1;
      add(choice, node, {batch, tokens, left});
      add(choice, node, {batch, tokens, columns + 1 - left});
      add_weights(choice, node, columns + 1);
      return node;
    }
    default:
      node.op = "SiluQMatMul";
      node.integers.insert({{"a_offset", offset}, {"gate_offset", spare - offset}});
      for (int i = 0; i < 2; ++i) add(choice, node, {batch, tokens, columns + spare});
  }
  add_weights(choice, node, columns);
  return node;
}

Node silu_mul(Choice& choice) {
  Node node;
  const int64_t batch = choice.of({1, 2}), tokens = rows_of(choice), width = columns_of(choice),
                spare = choice.of({0, 3});
  node.op = "SiluMul";
  node.integers.insert({{"a_offset", spare}, {"gate_offset", 0}, {"width", width}});
  for (int i = 0; i < 2; ++i) add(choice, node, {batch, tokens, width + spare});
  return node;
}

Node causal_conv(Choice& choice) {
  Node node;
  const int64_t batch = choice.of({1, 2, 0}), tokens = rows_of(choice), channels = columns_of(choice);
  const int64_t taps = choice.of({1, 2, 4, 8}), offset = choice.of({0, 5});
  node.op = "CausalConv";
  node.outputs = 2;
  node.integers["offset"] = offset;
  add(choice, node, {batch, tokens, channels + offset + choice.of({0, 3})});
  add(choice, node, {batch, taps - 1, channels});
  add(choice, node, {taps, channels});
  add(choice, node, {channels}, kFloat, !choice.one_in(2));
  add(choice, node, {batch, tokens}, kFloat, !choice.one_in(2));
  if (choice.one_in(2)) node.in_place[1] = 1;
  return node;
}

Node ssm_scan(Choice& choice) {
  Node node;
  const int64_t batch = choice.of({1, 2, 0}), tokens = choice.of({1, 1, 2, 24, 47, 48, 49, 97, 0});
  const int64_t groups = choice.of({1, 2}), heads = groups * choice.of({1, 3}),
                d_head = choice.of({1, 7, 8, 64, 66, 80});
  const int64_t d_state = choice.of({1, 3, 16, 32}), offset = choice.of({0, 2}), inner = heads * d_head;
  node.op = "SSMScan";
  node.outputs = 2;
  node.integers.insert({{"heads", heads}, {"groups", groups}, {"d_head", d_head}, {"d_state", d_state}});
  node.integers.insert({{"dt_offset", offset}, {"gate_offset", offset}});
  node.reals.insert({{"dt_min", 0.0f}, {"dt_max", std::numeric_limits<float>::infinity()}});
  add(choice, node, {batch, tokens, inner + 2 * groups * d_state});
  add(choice, node, {batch, tokens, heads + offset});
  for (int i = 0; i < 3; ++i) add(choice, node, {heads});
  add(choice, node, {batch, heads, d_state, d_head});
  add(choice, node, {batch, tokens});
  add(choice, node, {batch, tokens, inner + offset}, kFloat, !choice.one_in(2));
  if (choice.one_in(2)) node.in_place[1] = 5;
  return node;
}

Node attention(Choice& choice) {
  Node node;
  const int64_t batch = choice.of({1, 2, 0}), tokens = choice.of({1, 1, 2, 7, 65, 0}),
                past = choice.of({0, 1, 8, 70, 600});
  const int64_t kv_heads = choice.of({1, 2}), heads = kv_heads * choice.of({1, 3}), dim = choice.of({8, 24, 64, 96});
  const int64_t total = past + tokens, spare = choice.of({0, 4});
  const int64_t rows = choice.of({past, total, total + 3});
  node.op = "Attention";
  node.outputs = 3;
  node.integers.insert({{"num_heads", heads}, {"kv_heads", kv_heads}, {"head_dim", dim}, {"q_offset", spare}});
  node.integers["k_offset"] = spare + heads * dim;
  node.integers["v_offset"] = spare + (heads + kv_heads) * dim;
  node.reals["scale"] = 0.125f;
  add(choice, node, {batch, tokens, spare + (heads + 2 * kv_heads) * dim});
  for (int i = 0; i < 2; ++i) add(choice, node, {batch, tokens, dim / 2});
  add(choice, node, {batch, total}, kInteger);
  const auto cache =
      static_cast<ONNXTensorElementDataType>(choice.of({kFloat, kHalf, dim % 32 ? kFloat : kSignedByte}));
  const int64_t row = cache == kSignedByte ? dim + dim / 16 : dim;
  for (int i = 0; i < 2; ++i) add(choice, node, {batch, kv_heads, rows, row}, cache);
  if (rows >= total && choice.one_in(2)) node.in_place.insert({{1, 4}, {2, 5}});
  return node;
}

// A number that may wrap, lie outside, or be next to what it was.
int64_t hostile_integer(Choice& choice, int64_t now) {
  const auto power = static_cast<int64_t>(uint64_t{1} << choice.below(64));
  const int64_t near = static_cast<int64_t>(choice.below(17)) - 8;
  switch (choice.below(8)) {
    case 0:
      return 0;
    case 1:
      return static_cast<int64_t>(static_cast<uint64_t>(now) + static_cast<uint64_t>(near));
    case 2:
      return INT64_MAX - static_cast<int64_t>(choice.below(600));
    case 3:
      return choice.of({INT64_MIN, INT32_MAX, INT32_MIN, -1, int64_t{UINT32_MAX} + 1, 65536, 65537});
    case 4:
      return static_cast<int64_t>(UINT64_MAX / std::max<uint64_t>(1, static_cast<uint64_t>(now)) + choice.below(3));
    case 5:
      return static_cast<int64_t>(static_cast<uint64_t>(now) * 2);
    default:
      return static_cast<int64_t>(static_cast<uint64_t>(power) + static_cast<uint64_t>(near));
  }
}

float hostile_real(Choice& choice) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  const float values[] = {std::numeric_limits<float>::quiet_NaN(), kInfinity, -kInfinity, 0, -1, 1e38f, 1e-45f};
  return values[choice.below(std::size(values))];
}

// Gives an input another shape, with memory for it, unless the shape has more elements than fit.
void reshape(Choice& choice, Tensor& tensor, Shape shape) {
  const int64_t count = host::elements(shape, kMostInput);
  if (count < 0 || host::width_of(tensor.type) == 0) return;
  tensor.shape = std::move(shape);
  fill(choice, tensor, count);
}

void change_shape(Choice& choice, Tensor& tensor) {
  Shape shape = tensor.shape;
  const size_t at = shape.empty() ? 0 : choice.below(shape.size());
  switch (choice.below(7)) {
    case 0:
      return reshape(choice, tensor, {});
    case 1:
      if (!shape.empty()) shape.erase(shape.begin() + static_cast<std::ptrdiff_t>(at));
      break;
    case 2:
      shape.insert(shape.begin() + static_cast<std::ptrdiff_t>(at), choice.of({1, 0, 2}));
      break;
    case 3:
      if (!shape.empty()) shape[at] = 0;
      break;
    case 4:  // no elements, so that other sizes may be anything
      if (!shape.empty()) shape[at] = 0;
      for (int64_t& size : shape) {
        if (size != 0 && choice.one_in(2)) size = std::max<int64_t>(0, hostile_integer(choice, size));
      }
      break;
    case 5:
      return reshape(choice, tensor, {std::max<int64_t>(0, host::elements(shape, kMostInput))});
    default:
      if (!shape.empty()) shape[at] = std::max<int64_t>(0, hostile_integer(choice, shape[at]));
  }
  reshape(choice, tensor, std::move(shape));
}

}  // namespace

Node valid_node(Choice& choice) {
  constexpr Node (*kMakers[])(Choice&) = {product, product, silu_mul, causal_conv, ssm_scan, attention};
  Node node = kMakers[choice.below(std::size(kMakers))](choice);
  node.threads = choice.one_in(4) ? 3 : 1;
  return node;
}

void make_hostile(Choice& choice, Node& node) {
  const size_t index = choice.below(node.inputs.size());
  Tensor& input = node.inputs[index];
  switch (choice.below(12)) {
    case 0:
    case 1:
    case 2:
    case 3:
      if (!node.integers.empty()) {
        auto at = node.integers.begin();
        std::advance(at, choice.below(node.integers.size()));
        if (choice.one_in(16)) {
          node.integers.erase(at);
        } else {
          at->second = hostile_integer(choice, at->second);
        }
      }
      return;
    case 4:
      if (!node.reals.empty()) {
        auto at = node.reals.begin();
        std::advance(at, choice.below(node.reals.size()));
        at->second = hostile_real(choice);
      }
      return;
    case 5:
      node.given[index] = !node.given[index];
      return;
    case 6: {
      input.type = static_cast<ONNXTensorElementDataType>(choice.of({kFloat, kHalf, kByte, kSignedByte, kInteger}));
      return reshape(choice, input, input.shape);
    }
    case 7:
      input.shift = 1;
      return reshape(choice, input, input.shape);
    case 8:
      if (choice.one_in(4)) {
        node.outputs = choice.below(4);
      } else {
        std::swap(input, node.inputs[choice.below(node.inputs.size())]);
      }
      return;
    case 9:
      if (choice.one_in(2)) {
        node.inputs.pop_back();
        node.given.pop_back();
        if (node.inputs.empty()) add(choice, node, {1});
      } else {
        add(choice, node, {choice.of({1, 0, 3})});
      }
      std::erase_if(node.in_place, [&](const auto& pair) { return pair.second >= node.inputs.size(); });
      return;
    default:
      return change_shape(choice, input);
  }
}
