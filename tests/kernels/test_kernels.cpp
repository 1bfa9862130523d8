// The kernels on heap blocks of exactly the size they may touch, for a build with sanitizers or an emulated processor:
// every instruction set, rule, dtype and awkward length. Checks codes against the exact search, and sets against the
// scalar one.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <map>
#include <random>
#include <sstream>
#include <string>
#include <type_traits>
#include <vector>

#include "c_api.h"
#include "half.h"

using namespace opt8bit;

namespace {

std::mt19937 generator(0);

void check(bool condition, const std::string& what) {
  if (condition) return;
  std::fprintf(stderr, "failed: %s\n", what.c_str());
  std::exit(1);
}

// Not a vector, whose capacity may exceed its size: one byte beyond is an error that the sanitizer sees.
template <class T>
struct Exact {
  T* data;
  int64_t size;
  explicit Exact(int64_t size) : data(static_cast<T*>(std::malloc(size * sizeof(T)))), size(size) {
    std::memset(static_cast<void*>(data), 0, size * sizeof(T));
  }
  Exact(const Exact& other) : Exact(other.size) { std::memcpy(data, other.data, size * sizeof(T)); }
  ~Exact() { std::free(data); }
  bool operator==(const Exact& other) const { return std::memcmp(data, other.data, size * sizeof(T)) == 0; }
};

void set(float* target, float x) { *target = x; }
void set(bfloat16* target, float x) { *target = bfloat16_from_float(x); }
void set(float16* target, float x) { *target = float16_from_float(x); }

float widened(bfloat16 x) { return float_from_bfloat16(x); }
float widened(float16 x) { return float_from_float16(x); }

template <class T>
constexpr DType kDType = DType::float32;
template <>
constexpr DType kDType<bfloat16> = DType::bfloat16;
template <>
constexpr DType kDType<float16> = DType::float16;

template <class T>
Exact<T> random_values(int64_t n) {
  std::normal_distribution<float> normal;
  Exact<T> x(n);
  for (int64_t i = 0; i < n; ++i) set(x.data + i, std::pow(normal(generator), 3.0f));
  return x;
}

std::vector<std::string> sets() {
  std::istringstream names(opt8bit_instruction_sets());
  std::vector<std::string> result;
  for (std::string name; names >> name;) result.push_back(name);
  return result;
}

void test_quantize(const Kernels* kernels, int64_t rows, int64_t length, int64_t block_size, bool is_signed) {
  Exact<float> x = random_values<float>(rows * length);
  if (x.size > 9) {
    x.data[3] = std::numeric_limits<float>::quiet_NaN();
    x.data[5] = std::numeric_limits<float>::infinity();
    x.data[7] = -std::numeric_limits<float>::infinity();
    x.data[8] = 0;
  }
  const Codebook& map = dynamic_map(is_signed);
  const BlockView view(rows, length, block_size);
  Exact<uint8_t> codes(x.size);
  Exact<float> absmax(view.blocks()), decoded(x.size);
  opt8bit_quantize_blockwise(kernels, x.data, 0, rows, length, block_size, map.values, 256, codes.data, absmax.data, 2);
  opt8bit_dequantize_blockwise(kernels, codes.data, absmax.data, rows, length, block_size, map.values, 256,
                               decoded.data, 0, 2);
  view.for_each(0, view.blocks(), [&](int64_t block, int64_t offset, int64_t n) {
    float largest = 0;
    for (int64_t i = offset; i < offset + n; ++i)
      if (std::isfinite(x.data[i])) largest = std::fmax(largest, std::fabs(x.data[i]));
    check(absmax.data[block] == largest, "absmax");
    for (int64_t i = offset; i < offset + n; ++i) {
      check(codes.data[i] == nearest_code(x.data[i], largest, map), "nearest code");
      check(decoded.data[i] == map.values[codes.data[i]] * largest, "decoded value");
    }
  });
}

// The first element of the largest magnitude, where `x` is finite. A state without signs has nothing below zero.
float largest_of(const float* x, int64_t n, bool is_signed) {
  float largest = 0;
  for (int64_t i = 0; i < n; ++i)
    if (std::isfinite(x[i]) && (is_signed || x[i] > 0) && std::fabs(x[i]) > std::fabs(largest)) largest = x[i];
  return largest;
}

uint8_t state_code(float x, float scale, bool is_signed) {
  const uint8_t code = nearest_state_code(is_signed || !(x < 0) ? x : 0, scale, dynamic_map(is_signed));
  return !is_signed && code == 0 && x > 0 && scale != 0 ? 1 : code;  // what is positive stays so
}

void check_encoded(const Kernels* kernels, const Exact<float>& x, int64_t rows, int64_t length, int64_t block_size,
                   bool is_signed) {
  const BlockView view(rows, length, block_size);
  Exact<uint8_t> codes(x.size), mirrored_codes(x.size);
  Exact<float> scales(view.blocks()), mirrored_scales(view.blocks()), mirrored(x.size);
  opt8bit_encode_state(kernels, x.data, rows, length, block_size, is_signed, codes.data, scales.data, 2);
  view.for_each(0, view.blocks(), [&](int64_t block, int64_t offset, int64_t n) {
    const float scale = scales.data[block];
    check(scale == largest_of(x.data + offset, n, is_signed), "scale");
    check(scale != 0 || !std::signbit(scale), "a scale of zero has no sign");
    for (int64_t i = offset; i < offset + n; ++i)
      check(codes.data[i] == state_code(x.data[i], scale, is_signed), "nearest code of a state");
  });
  if (!is_signed) return;
  for (int64_t i = 0; i < x.size; ++i) mirrored.data[i] = -x.data[i];
  opt8bit_encode_state(kernels, mirrored.data, rows, length, block_size, is_signed, mirrored_codes.data,
                       mirrored_scales.data, 2);
  check(mirrored_codes == codes, "codes of the negative");
  for (int64_t block = 0; block < view.blocks(); ++block)
    check(mirrored_scales.data[block] == -scales.data[block], "scales of the negative");
}

void test_encode_state(const Kernels* kernels, int64_t rows, int64_t length, int64_t block_size, bool is_signed) {
  Exact<float> x = random_values<float>(rows * length);
  if (!is_signed)
    for (int64_t i = 0; i < x.size; ++i)
      if (i % 3) x.data[i] = std::fabs(x.data[i]);
  check_encoded(kernels, x, rows, length, block_size, is_signed);
  // In every block the largest elements are a and -a, in either order, beside midpoints between two codes of them.
  const BlockView view(rows, length, block_size);
  const Codebook& map = dynamic_map(is_signed);
  const float magnitudes[] = {1, 3, 0.7324219f, 1e-40f, 0x1p-149f, 3e38f, 0x1p-101f};
  view.for_each(0, view.blocks(), [&](int64_t block, int64_t offset, int64_t n) {
    const float magnitude = magnitudes[block % 7];
    for (int64_t i = offset; i < offset + n; ++i) {
      x.data[i] = static_cast<float>(map.midpoints[generator() % 255] * magnitude);
      if (generator() % 2) x.data[i] = std::nextafter(x.data[i], generator() % 2 ? magnitude : -magnitude);
    }
    const int64_t one = offset + generator() % n, other = offset + generator() % n;
    x.data[one] = magnitude;
    x.data[other] = -magnitude;
    if (n > 4 && block % 2) {
      x.data[offset + n / 2] = std::numeric_limits<float>::infinity();
      x.data[offset + n / 3] = -std::numeric_limits<float>::infinity();
      x.data[offset + n / 4] = std::numeric_limits<float>::quiet_NaN();
    }
  });
  check_encoded(kernels, x, rows, length, block_size, is_signed);
  for (int64_t i = 0; i < x.size; ++i)
    x.data[i] = i % 2 ? -0.0f : i % 3 ? 0.0f : -std::numeric_limits<float>::infinity();
  check_encoded(kernels, x, rows, length, block_size, is_signed);
}

// Of whatever rule has it.
const std::map<std::string, double> kHyper = {
    {"lr", 0.1},      {"beta1", 0.9},    {"beta2", 0.999}, {"beta3", 0.9999},          {"alpha", 0.99},
    {"t_alpha", 10},  {"t_beta3", 10},   {"eps", 1e-8},    {"weight_decay", 0.01},     {"momentum", 0.9},
    {"dampening", 0}, {"lr_decay", 0.1}, {"nesterov", 1},  {"trust_coefficient", 0.1}, {"bias_correction", 1},
    {"adapt", 1},     {"maximize", 0},
};

Group group_of(const Kernels* kernels, int64_t rule, int64_t block_size, Rounding rounding) {
  Group group = {rule, block_size, {}, 2.0, rounding, 5};
  std::istringstream names(kernels->rules[rule].hyper);
  int64_t count = 0;
  for (std::string name; std::getline(names >> std::ws, name, ',');) group.hyper[count++] = kHyper.at(name);
  return group;
}

template <class T>
struct Stepped {
  Exact<T> param;
  std::vector<Exact<uint8_t>> codes;
  std::vector<Exact<float>> values, scales;
  Exact<int16_t> compensation;
  bool operator==(const Stepped& other) const {
    return param == other.param && codes == other.codes && values == other.values && scales == other.scales &&
           compensation == other.compensation;
  }
};

// Three steps of one rule.
template <class T, class G>
Stepped<T> run_step(const Kernels* kernels, int64_t rule, Rounding rounding, int64_t bits, int64_t rows, int64_t length,
                    int64_t positions, const Exact<T>& start, const Exact<G>& grad) {
  constexpr int64_t kBlockSize = 256;
  const BlockView view(rows, length, kBlockSize);
  Stepped<T> stepped = {start, std::vector<Exact<uint8_t>>(kMaxStates, Exact<uint8_t>(start.size)),
                        std::vector<Exact<float>>(kMaxStates, Exact<float>(start.size)),
                        std::vector<Exact<float>>(kMaxStates, Exact<float>(view.blocks())), Exact<int16_t>(start.size)};
  float step = 0;
  Tensor tensor = {stepped.param.data, grad.data, &step, {}, {}, nullptr,   rows, length, kDType<T>,
                   kDType<G>,          bits,      0,     7,  5,  positions, 0,    0};
  if (rounding == Rounding::compensated) tensor.compensation = stepped.compensation.data;
  for (int s = 0; s < kMaxStates; ++s) {
    tensor.states[s] = bits == 8 ? static_cast<void*>(stepped.codes[s].data) : stepped.values[s].data;
    tensor.scales[s] = stepped.scales[s].data;
  }
  const Group group = group_of(kernels, rule, kBlockSize, rounding);
  for (int i = 0; i < 3; ++i) opt8bit_step(kernels, &tensor, 1, &group, 2);
  check(step == 3, "step count");
  return stepped;
}

template <class T, class G>
void test_steps(const Kernels* kernels, Rounding rounding) {
  const Kernels* scalar = opt8bit_kernels("scalar");
  check(kernels->rule_count == scalar->rule_count, "the same rules");
  for (int64_t rule = 0; rule < kernels->rule_count; ++rule) {
    const std::string name = kernels->rules[rule].name;
    for (int64_t length : {16, 17, 63, 64, 100, 256, 300, 515}) {
      for (int64_t bits : {8, 32}) {
        const Exact<T> start = random_values<T>(3 * length);
        Exact<G> grad = random_values<G>(3 * length);
        if (length > 256) {
          set(grad.data + 5, std::numeric_limits<float>::infinity());
          set(grad.data + 6, 0);
        }
        const int64_t positions = length == 64 && std::is_same_v<T, G> ? 8 : 0;
        const auto stepped = [&](const Kernels* kernels) {
          return run_step(kernels, rule, rounding, bits, 3, length, positions, start, grad);
        };
        const Stepped<T> mine = stepped(kernels);
        check(mine == stepped(scalar), name + ": the same bits as scalar");
        check(!(mine.param == start), name + ": the parameter moved");
        if constexpr (std::is_same_v<T, float> && !std::is_same_v<G, float>) {
          Exact<float> wide(grad.size);
          for (int64_t i = 0; i < grad.size; ++i) wide.data[i] = widened(grad.data[i]);
          check(mine == run_step(kernels, rule, rounding, bits, 3, length, 0, start, wide), name + ": widened");
        }
      }
    }
  }
}

// Every number of 16 bits is read, and numbers of every kind are written, as by the scalar set.
template <class T>
void test_dtype(const Kernels* kernels, DType dtype) {
  const Kernels* scalar = opt8bit_kernels("scalar");
  const int64_t kind = static_cast<int64_t>(dtype), count = 1 << 16, block_size = 8;
  const float* map = dynamic_map(true).values;
  Exact<T> x(count);
  for (int64_t i = 0; i < count; ++i) x.data[i].bits = static_cast<uint16_t>(i);
  const auto quantized = [&](const Kernels* set) {
    Exact<uint8_t> codes(count);
    Exact<float> absmax(count / block_size);
    opt8bit_quantize_blockwise(set, x.data, kind, 1, count, block_size, map, 256, codes.data, absmax.data, 2);
    return std::make_pair(codes, absmax);
  };
  check(quantized(kernels) == quantized(scalar), "numbers of 16 bits, read");
  Exact<uint8_t> codes(count);
  Exact<float> scales(count / block_size), table(256);
  for (int64_t i = 0; i < count; ++i) codes.data[i] = static_cast<uint8_t>(generator());
  for (int64_t i = 0; i < scales.size; ++i) scales.data[i] = float_from_bits(static_cast<uint32_t>(generator()));
  for (int64_t i = 0; i < table.size; ++i) table.data[i] = std::ldexp(1.0f + i / 256.0f, -static_cast<int>(i % 30));
  const auto dequantized = [&](const Kernels* set) {
    Exact<T> values(count);
    opt8bit_dequantize_blockwise(set, codes.data, scales.data, 1, count, block_size, table.data, 256, values.data, kind,
                                 2);
    return values;
  };
  check(dequantized(kernels) == dequantized(scalar), "numbers of 16 bits, written");
}

// What the kernels of weight_rounding.h make of one random weight: grids and rounded weights.
struct Rounded {
  Exact<float> scale, zero_point, rounded;
  bool operator==(const Rounded& other) const {
    return scale == other.scale && zero_point == other.zero_point && rounded == other.rounded;
  }
};

Rounded round_weight(const Kernels* kernels, const Exact<float>& weight, int64_t rows, const Exact<float>& matrix,
                     ZeroPoints zero_points, DType scale_dtype, int64_t fraction_count) {
  constexpr int64_t kGroup = 16;
  constexpr float kFractions[] = {1.0f, 0.9f, 0.75f, 0.6f};
  const int64_t columns = weight.size / rows, groups = (columns + kGroup - 1) / kGroup;
  Exact<int64_t> group_of(columns);
  Exact<float> importance(columns);
  for (int64_t j = 0; j < columns; ++j) {
    group_of.data[j] = j / kGroup;
    importance.data[j] = 1.0f + j % 5;
  }
  Rounded result = {Exact<float>(rows * groups), Exact<float>(rows * groups), Exact<float>(weight.size)};
  const WeightRounding layer = {weight.data,
                                rows,
                                columns,
                                group_of.data,
                                groups,
                                result.scale.data,
                                result.zero_point.data,
                                7,
                                zero_points,
                                scale_dtype,
                                kFractions,
                                fraction_count,
                                importance.data,
                                matrix.data,
                                result.rounded.data};
  opt8bit_gptq(kernels, &layer, 1, 2);
  opt8bit_fit_grids(kernels, &layer, 2);
  opt8bit_gptq(kernels, &layer, 0, 2);
  opt8bit_coordinate_descent(kernels, &layer, 3, 2);
  return result;
}

void test_weight_rounding(const Kernels* kernels) {
  const Kernels* scalar = opt8bit_kernels("scalar");
  for (int64_t rows : {1, 37}) {
    for (int64_t columns : {1, 71}) {
      const Exact<float> weight = random_values<float>(rows * columns);
      Exact<float> matrix = random_values<float>(columns * columns);
      for (int64_t j = 0; j < columns; ++j) matrix.data[j * columns + j] = 10.0f + j;
      for (ZeroPoints zero_points : {ZeroPoints::kFitted, ZeroPoints::kMiddle, ZeroPoints::kEither})
        for (DType dtype : {DType::float32, DType::bfloat16, DType::float16})
          for (int64_t fractions : {0, 4}) {
            const auto rounded = [&](const Kernels* set) {
              return round_weight(set, weight, rows, matrix, zero_points, dtype, fractions);
            };
            check(rounded(kernels) == rounded(scalar), "rounded weights: the same bits as scalar");
          }
    }
  }
}

void test_absent_gradients(const Kernels* kernels) {
  const Group group = group_of(kernels, 0, 256, Rounding::nearest);
  const Exact<float> start = random_values<float>(300), grad = random_values<float>(300);
  std::vector<Exact<float>> params(3, start);
  float steps[3] = {};
  std::vector<Tensor> tensors;
  std::vector<Exact<float>> values(3 * kMaxStates, Exact<float>(300));
  for (int i = 0; i < 3; ++i) {
    tensors.push_back({params[i].data, grad.data, i == 1 ? nullptr : steps + i, {}, {}, nullptr, 1, 300});
    tensors[i].state_bits = 32;
    for (int s = 0; s < kMaxStates; ++s) tensors[i].states[s] = values[i * kMaxStates + s].data;
  }
  opt8bit_step(kernels, tensors.data(), 3, &group, 2);
  check(params[1] == start && steps[1] == 0, "a parameter without a gradient stays");
  check(params[0] == params[2] && !(params[0] == start) && steps[0] == 1, "those beside it are stepped");
}

// Stands in for torch's tensors behind its C interface.
struct FakeTensor {
  int64_t dim;
  int32_t layout;
  int64_t sizes[2], strides[2];
};
const FakeTensor& fake(const void* handle) { return **static_cast<const FakeTensor* const*>(handle); }

void test_describe() {
  TorchFunctions torch;
  torch.get_layout = [](const void* t, int32_t* layout) { return *layout = fake(t).layout, 0; };
  torch.get_data_ptr = [](const void* t, void** data) { return *data = const_cast<FakeTensor*>(&fake(t)), 0; };
  torch.get_dtype = [](const void*, int32_t* dtype) { return *dtype = 6, 0; };
  torch.get_device_type = [](const void*, int32_t* type) { return *type = 0, 0; };
  torch.get_device_index = [](const void*, int32_t* index) { return *index = -1, 0; };
  torch.get_dim = [](const void* t, int64_t* dim) { return *dim = fake(t).dim, 0; };
  torch.get_sizes = [](const void* t, int64_t** sizes) { return *sizes = const_cast<int64_t*>(fake(t).sizes), 0; };
  torch.get_strides = [](const void* t, int64_t** s) { return *s = const_cast<int64_t*>(fake(t).strides), 0; };
  torch.strided = [] { return int32_t{3}; };

  const FakeTensor kinds[] = {
      {2, 3, {4, 5}, {5, 1}}, {1, 3, {7, 0}, {2, 0}}, {0, 3, {}, {}}, {1, 0, {7, 0}, {1, 0}}, {3, 3, {}, {}}};
  const int64_t count = 1000, width = kDescribed + 2 * 2;
  struct FakeObject {
    int64_t references;
    const char* type;
    const FakeTensor* tensor;
  };
  Exact<FakeObject> tensors(count);
  Exact<const char*> at(count);
  for (int64_t i = 0; i < count; ++i) {
    tensors.data[i] = {1, reinterpret_cast<const char*>(i + 1), &kinds[i % 5]};
    at.data[i] = reinterpret_cast<const char*>(tensors.data + i);
  }
  const Objects objects = {at.data, 16, 8};
  Exact<int64_t> rows(count * width);
  const void* functions[9];
  std::memcpy(functions, &torch, sizeof torch);
  opt8bit_describe(functions, &objects, count, 2, rows.data);
  for (int64_t i = 0; i < count; ++i) {
    const FakeTensor& kind = kinds[i % 5];
    const int64_t* const row = rows.data + i * width;
    if (kind.layout != 3 || kind.dim > 2) {
      for (int64_t k = 0; k < width; ++k) check(row[k] == -1, "a tensor that cannot be described");
      continue;
    }
    check(row[0] == i + 1 && row[1] == 6 && row[2] == 0 && row[3] == -1 && row[4] == kind.dim, "what it is");
    for (int64_t k = 0; k < kind.dim; ++k)
      check(row[5 + k] == kind.sizes[k] && row[7 + k] == kind.strides[k], "sizes and strides");
  }
  for (int64_t i = 0; i < count; ++i) tensors.data[i].tensor = &kinds[i % 3];
  opt8bit_describe(functions, &objects, count, 2, rows.data);
  Exact<int64_t> found(count);
  const auto are_alike = [&] {
    return opt8bit_addresses(functions, &objects, count, 2, rows.data, found.data, 2) != 0;
  };
  check(are_alike(), "tensors are as they were");
  for (int64_t i = 0; i < count; ++i)
    check(found.data[i] == reinterpret_cast<int64_t>(&kinds[i % 3]), "where data lie");
  rows.data[count * width - 1] += 1;
  check(!are_alike(), "a tensor has another stride");
  rows.data[count * width - 1] -= 1;
  tensors.data[count - 1] = {1, nullptr, nullptr};
  check(!are_alike(), "an object of another type, in which there is no tensor");
}

}  // namespace

int main() {
  test_describe();
  check(opt8bit_kernels("abacus") == nullptr, "an unknown instruction set");
  for (const std::string& name : sets()) {
    const Kernels* kernels = opt8bit_kernels(name.c_str());
    check(kernels != nullptr, name);
    for (bool is_signed : {false, true})
      for (int64_t length : {0, 1, 15, 16, 17, 63, 64, 65, 255, 256, 257, 1023, 1024, 1025, 40000})
        for (int64_t block_size : {1, 16, 64, 100, 256, 2000, 65536})
          test_quantize(kernels, 2, length, block_size, is_signed);
    for (bool is_signed : {false, true})
      for (int64_t length : {0, 1, 15, 16, 17, 63, 64, 65, 300, 1023, 1024, 1025, 5000})
        for (int64_t block_size : {1, 2, 16, 64, 100, 256, 2000, 5000})
          test_encode_state(kernels, 3, length, block_size, is_signed);
    test_steps<float, float>(kernels, Rounding::nearest);
    test_steps<float, bfloat16>(kernels, Rounding::nearest);
    test_steps<float, float16>(kernels, Rounding::nearest);
    test_steps<float16, float16>(kernels, Rounding::nearest);
    test_steps<float16, bfloat16>(kernels, Rounding::nearest);
    for (Rounding rounding : {Rounding::nearest, Rounding::stochastic, Rounding::compensated}) {
      test_steps<bfloat16, bfloat16>(kernels, rounding);
      test_steps<bfloat16, float>(kernels, rounding);
    }
    test_absent_gradients(kernels);
    test_dtype<bfloat16>(kernels, DType::bfloat16);
    test_dtype<float16>(kernels, DType::float16);
    test_weight_rounding(kernels);
    std::printf("%s: ok\n", name.c_str());
  }
}
