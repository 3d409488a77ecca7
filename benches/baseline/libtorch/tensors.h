// Named tensors on standard input and output: a line `tensors N`, then for each a line `NAME TYPE SIZE SIZE …` and its
// values, little endian.
#pragma once

#include <iostream>
#include <map>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include <torch/types.h>

using Tensors = std::map<std::string, torch::Tensor>;

inline torch::ScalarType type_of(const std::string& name) {
  if (name == "f32") return torch::kFloat32;
  if (name == "f64") return torch::kFloat64;
  if (name == "i64") return torch::kInt64;
  throw std::runtime_error("no type is called " + name);
}

inline std::string read_line() {
  std::string line;
  if (!std::getline(std::cin, line)) throw std::runtime_error("the input ends too early");
  return line;
}

// Tensors in the host's memory.
inline Tensors read_tensors() {
  std::istringstream head(read_line());
  std::string word, name, type;
  int64_t count = 0;
  head >> word >> count;
  if (word != "tensors") throw std::runtime_error("expected tensors, not " + word);
  Tensors tensors;
  for (int64_t i = 0; i < count; ++i) {
    std::istringstream line(read_line());
    line >> name >> type;
    std::vector<int64_t> shape;
    for (int64_t size = 0; line >> size;) shape.push_back(size);
    torch::Tensor tensor = torch::empty(shape, type_of(type));
    std::cin.read(static_cast<char*>(tensor.data_ptr()), static_cast<std::streamsize>(tensor.nbytes()));
    if (!std::cin) throw std::runtime_error("the input ends in tensor " + name);
    tensors.emplace(name, tensor);
  }
  return tensors;
}

// Writes reals in double precision, which holds each of them exactly.
inline void write_tensors(const Tensors& tensors) {
  std::cout << "tensors " << tensors.size() << '\n';
  for (const auto& [name, given] : tensors) {
    torch::Tensor tensor = given.detach().to(torch::kCPU, torch::kFloat64).contiguous();
    std::cout << name << " f64";
    for (int64_t size : tensor.sizes()) std::cout << ' ' << size;
    std::cout << '\n';
    std::cout.write(static_cast<const char*>(tensor.data_ptr()), static_cast<std::streamsize>(tensor.nbytes()));
  }
  std::cout.flush();
}
