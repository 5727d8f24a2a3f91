#include "convert/methods/layer_pipeline.h"

#include <algorithm>
#include <condition_variable>
#include <mutex>
#include <utility>
#include <vector>

#include "linalg/threads.h"

namespace relatent {
namespace {

// Layers on their way through body and finish; the state that workers share.
class Flight {
 public:
  Flight(Index first_layer, Index layers, Index at_once, const LayerWork& work)
      : layers_(layers),
        at_once_(at_once),
        work_(work),
        next_(std::min(first_layer, layers)),
        finished_(first_layer),
        ready_(static_cast<std::size_t>(std::max<Index>(0, layers)), false) {}

  // One worker's share. After an exception in any of them the others return.
  void take_part(bool first) {
    try {
      if (first && work_.beside) {
        work_.beside();
      }
      std::unique_lock lock(guard_);
      while (true) {
        changed_.wait(lock, [&] { return stopped_ || next_ == layers_ || next_ < finished_ + at_once_; });
        if (stopped_ || next_ == layers_) {
          return;
        }
        const Index layer_idx = next_++;
        Moments moments = work_.moments(layer_idx);
        lock.unlock();
        work_.body(layer_idx, std::move(moments));
        lock.lock();
        ready_[static_cast<std::size_t>(layer_idx)] = true;
        finish(lock);
      }
    } catch (...) {
      {
        const std::lock_guard lock(guard_);
        stopped_ = true;
      }
      changed_.notify_all();
      throw;
    }
  }

 private:
  // Finishes what is ready, in order, unless somebody else is at it, who will then see to this layer too.
  void finish(std::unique_lock<std::mutex>& lock) {
    if (finishing_) {
      return;
    }
    finishing_ = true;
    while (finished_ < layers_ && ready_[static_cast<std::size_t>(finished_)] && !stopped_) {
      lock.unlock();
      work_.finish(finished_);
      lock.lock();
      ++finished_;
      changed_.notify_all();
    }
    finishing_ = false;
  }

  Index layers_;
  Index at_once_;
  const LayerWork& work_;
  std::mutex guard_;  // guards what follows
  std::condition_variable changed_;
  Index next_;
  Index finished_;  // changed by who is finishing alone
  std::vector<bool> ready_;
  bool finishing_ = false;
  bool stopped_ = false;
};

}  // namespace

void run_layer_pipeline(Index first_layer, Index layers, Index at_once, const LayerWork& work) {
  Flight flight(first_layer, layers, at_once, work);
  parallel_for(static_cast<std::size_t>(at_once + (work.beside ? 1 : 0)),
               [&](std::size_t worker) { flight.take_part(worker == 0); });
}

}  // namespace relatent
