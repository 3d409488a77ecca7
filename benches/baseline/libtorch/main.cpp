// The libtorch baseline's program. Arguments are KEY=VALUE; commands come on standard input, one a line:
//   load      followed by the state's tensors, GROUP:NAME
//   step      followed by a batch: answers `SECONDS DEVICE_SECONDS CLASS_LOSS PEAK_DEVICE_BYTES`
//   results   answers with tensors by golden names
// libtorch_cpp.py speaks to it.

#include <chrono>
#include <iomanip>
#include <memory>

#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/Event.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include "step.h"

namespace {

using Clock = std::chrono::steady_clock;
using Settings = std::map<std::string, std::string>;

double since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

Settings read_settings(int count, char** arguments) {
  Settings settings;
  for (int i = 1; i < count; ++i) {
    const std::string argument = arguments[i];
    const size_t at = argument.find('=');
    if (at == std::string::npos) throw std::runtime_error(argument + ": expected KEY=VALUE");
    settings[argument.substr(0, at)] = argument.substr(at + 1);
  }
  return settings;
}

How read_how(const Settings& settings) {
  const auto number = [&](const char* key) { return std::stod(settings.at(key)); };
  How how;
  std::istringstream blocks(settings.at("blocks"));
  for (std::string count; std::getline(blocks, count, ',');) how.blocks.push_back(std::stoll(count));
  how.sequential = number("sequential") != 0;
  how.first_order = number("first_order") != 0;
  how.kl_scale = number("kl_scale");
  how.alpha = number("alpha");
  how.eta = number("eta");
  how.lr = number("lr");
  how.momentum = number("momentum");
  how.weight_decay = number("weight_decay");
  how.gamma = number("gamma");
  return how;
}

class Program {
 public:
  explicit Program(const Settings& settings)
      : how_(read_how(settings)), device_(settings.at("device")), type_(type_of(settings.at("type"))) {
    if (!device_.is_cpu() && !at::hasCUDA()) throw std::runtime_error("libtorch sees no card");
    if (device_.is_cuda()) device_ = torch::Device(torch::kCUDA, 0);
    at::set_num_threads(std::stoi(settings.at("threads")));
    const bool tf32 = settings.at("tf32") == "1";
    at::globalContext().setBenchmarkCuDNN(true);
    at::globalContext().setAllowTF32CuDNN(tf32);
    at::globalContext().setAllowTF32CuBLAS(tf32);
  }

  void command(const std::string& word) {
    if (word == "load") student_ = std::make_unique<Student>(how_, place(read_tensors()));
    else if (!student_) throw std::runtime_error(word + " before load");
    else if (word == "step") step(read_tensors());
    else if (word == "results") write_tensors(student_->results());
    else throw std::runtime_error("no command is called " + word);
  }

 private:
  Tensors place(Tensors tensors) const {
    for (auto& [name, tensor] : tensors) tensor = tensor.to(device_, tensor.is_floating_point() ? type_ : torch::kInt64);
    return tensors;
  }

  void step(const Tensors& given) {
    const auto start = Clock::now();
    const Tensors batch = place(given);
    const double device_seconds = device_.is_cpu() ? on_host(batch) : on_card(batch);
    const double loss = student_->class_loss();
    const double seconds = since(start);
    int64_t peak = 0;
    if (!device_.is_cpu()) {
      const auto total = static_cast<size_t>(c10::CachingAllocator::StatType::AGGREGATE);
      peak = c10::getDeviceAllocator(device_.type())->getDeviceStats(0).allocated_bytes[total].peak;
    }
    std::cout << std::setprecision(17) << seconds << ' ' << device_seconds << ' ' << loss << ' ' << peak << std::endl;
  }

  double on_host(const Tensors& batch) {
    const auto start = Clock::now();
    student_->step(batch);
    return since(start);
  }

  // By the card's own clock.
  double on_card(const Tensors& batch) {
    const c10::impl::VirtualGuardImpl guard(device_.type());
    const c10::Stream stream = guard.getStream(device_);
    c10::Event start(device_.type(), c10::EventFlag::BACKEND_DEFAULT), stop(device_.type(), c10::EventFlag::BACKEND_DEFAULT);
    start.record(stream);
    student_->step(batch);
    stop.record(stream);
    stop.synchronize();
    return start.elapsedTime(stop) / 1e3;
  }

  How how_;
  torch::Device device_;
  torch::ScalarType type_;
  std::unique_ptr<Student> student_;
};

}  // namespace

int main(int count, char** arguments) {
  try {
    Program program(read_settings(count, arguments));
    for (std::string word; std::getline(std::cin, word);) program.command(word);
  } catch (const std::exception& error) {
    std::cerr << error.what() << std::endl;
    return 1;
  }
  return 0;
}
