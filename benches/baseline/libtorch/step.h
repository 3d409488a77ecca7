// The PreAct ResNet and the MLNT step on libtorch's autograd: a loop over the branches, each with its own forward at θ.
#pragma once

#include <torch/csrc/autograd/autograd.h>
#include <torch/nn/functional.h>

#include "tensors.h"

struct How {
  std::vector<int64_t> blocks;
  bool sequential = true, first_order = false;
  double kl_scale = 1, alpha = 0, eta = 0, lr = 0, momentum = 0, weight_decay = 0, gamma = 0;
};

constexpr double kBnEps = 1e-5, kBnMomentum = 0.1;

// Batch statistics; the running ones are updated where there are `buffers`.
inline torch::Tensor batch_norm(const Tensors& p, const std::string& name, const torch::Tensor& x, const Tensors* buffers) {
  torch::Tensor mean, var;
  if (buffers != nullptr) {
    mean = buffers->at(name + ".running_mean");
    var = buffers->at(name + ".running_var");
  }
  return torch::batch_norm(x, p.at(name + ".weight"), p.at(name + ".bias"), mean, var, true, kBnMomentum, kBnEps, true);
}

inline torch::Tensor conv(const torch::Tensor& x, const torch::Tensor& w, int64_t stride, int64_t padding) {
  return torch::conv2d(x, w, {}, stride, padding);
}

// Logits [k, classes].
inline torch::Tensor forward(const How& how, const Tensors& p, torch::Tensor x, const Tensors* buffers = nullptr) {
  x = conv(x, p.at("conv1.weight"), 1, 1);
  for (size_t stage = 0; stage < how.blocks.size(); ++stage) {
    for (int64_t block = 0; block < how.blocks[stage]; ++block) {
      const std::string at = "layer" + std::to_string(stage + 1) + "." + std::to_string(block);
      const int64_t stride = stage > 0 && block == 0 ? 2 : 1;
      torch::Tensor h = torch::relu(batch_norm(p, at + ".bn1", x, buffers));
      const auto shortcut = p.find(at + ".shortcut.0.weight");
      const torch::Tensor skip = shortcut == p.end() ? x : conv(h, shortcut->second, stride, 0);
      h = conv(h, p.at(at + ".conv1.weight"), stride, 1);
      h = torch::relu(batch_norm(p, at + ".bn2", h, buffers));
      x = conv(h, p.at(at + ".conv2.weight"), 1, 1) + skip;
    }
  }
  x = torch::relu(batch_norm(p, "bn", x, buffers)).mean({2, 3});
  return torch::linear(x, p.at("linear.weight"), p.at("linear.bias"));
}

// What a step reads and writes, and what it reports, by golden names.
class Student {
 public:
  Student(How how, const Tensors& state) : how_(std::move(how)) {
    for (const auto& [name, tensor] : state) group_of(name)[name.substr(name.rfind(':') + 1)] = tensor.clone();
    for (auto& [name, tensor] : param_) tensor.requires_grad_(true);
  }

  void step(const Tensors& batch) {
    const torch::Tensor &x = batch.at("x"), &y = batch.at("y"), &weight = batch.at("class_weight");
    if (!how_.sequential) update_teacher();
    {
      torch::NoGradGuard guard;
      target_ = forward(how_, teacher_param_, x, &teacher_buffer_).softmax(1);
    }
    if (how_.sequential) {
      meta_gradient(x, batch.at("y_syn"));
      torch::NoGradGuard guard;
      for (auto& [name, tensor] : param_) tensor.sub_(meta_.at(name), how_.eta);
    }
    const torch::Tensor losses = torch::cross_entropy_loss(forward(how_, param_, x, &buffer_), y, {}, at::Reduction::None);
    const torch::Tensor loss = (losses * weight).sum();
    Tensors gradient = gradients(loss, false);
    class_loss_ = loss.detach();
    if (!how_.sequential) {
      meta_gradient(x, batch.at("y_syn"));
      for (auto& [name, tensor] : gradient) tensor = tensor + how_.eta * meta_.at(name);
    }
    sgd(gradient);
    if (how_.sequential) update_teacher();
  }

  double class_loss() const { return class_loss_.item<double>(); }

  Tensors results() const {
    Tensors all{{"target", target_}, {"class_loss", class_loss_}, {"inner_loss", torch::stack(inner_loss_)}};
    all["consistency"] = torch::stack(consistency_);
    const std::pair<std::string, const Tensors*> groups[] = {
        {"meta_grad", &meta_}, {"param", &param_}, {"momentum", &momentum_}, {"buffer", &buffer_},
        {"teacher.param", &teacher_param_}, {"teacher.buffer", &teacher_buffer_}};
    for (const auto& [group, tensors] : groups) {
      for (const auto& [name, tensor] : *tensors) all[group + "." + name] = tensor;
    }
    return all;
  }

 private:
  // State tensors are called GROUP:NAME.
  Tensors& group_of(const std::string& name) {
    const std::string group = name.substr(0, name.rfind(':'));
    if (group == "param") return param_;
    if (group == "momentum") return momentum_;
    if (group == "buffer") return buffer_;
    if (group == "teacher.param") return teacher_param_;
    if (group == "teacher.buffer") return teacher_buffer_;
    throw std::runtime_error("no state is called " + name);
  }

  Tensors gradients(const torch::Tensor& loss, bool create_graph) {
    std::vector<torch::Tensor> theta;
    for (const auto& [name, tensor] : param_) theta.push_back(tensor);
    const auto list = torch::autograd::grad({loss}, theta, {}, std::nullopt, create_graph);
    Tensors named;
    size_t i = 0;
    for (const auto& [name, tensor] : param_) named[name] = list[i++];
    return named;
  }

  void meta_gradient(const torch::Tensor& x, const torch::Tensor& y_syn) {
    const int64_t branches = y_syn.size(0);
    inner_loss_.clear();
    consistency_.clear();
    meta_.clear();
    for (int64_t m = 0; m < branches; ++m) {
      const torch::Tensor inner = torch::cross_entropy_loss(forward(how_, param_, x), y_syn[m]);
      const Tensors gradient = gradients(inner, !how_.first_order);
      Tensors fast;
      for (const auto& [name, tensor] : param_) fast[name] = tensor - how_.alpha * gradient.at(name);
      const torch::Tensor log_p = torch::log_softmax(forward(how_, fast, x), 1);
      const torch::Tensor divergence = torch::kl_div(log_p, target_, at::Reduction::Sum) / x.size(0);
      const torch::Tensor consistency = how_.kl_scale * divergence;
      for (const auto& [name, tensor] : gradients(consistency / branches, false)) {
        if (m == 0) meta_[name] = tensor;
        else meta_[name].add_(tensor);
      }
      inner_loss_.push_back(inner.detach());
      consistency_.push_back(consistency.detach());
    }
  }

  void sgd(const Tensors& gradient) {
    torch::NoGradGuard guard;
    for (auto& [name, tensor] : param_) {
      const torch::Tensor g = gradient.at(name).add(tensor, how_.weight_decay);
      tensor.sub_(momentum_.at(name).mul_(how_.momentum).add_(g), how_.lr);
    }
  }

  void update_teacher() {
    torch::NoGradGuard guard;
    for (auto& [name, tensor] : teacher_param_) tensor.mul_(how_.gamma).add_(param_.at(name), 1 - how_.gamma);
  }

  How how_;
  Tensors param_, momentum_, buffer_, teacher_param_, teacher_buffer_, meta_;
  torch::Tensor target_, class_loss_;
  std::vector<torch::Tensor> inner_loss_, consistency_;
};
