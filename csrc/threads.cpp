// Threads of the library's own: a second OpenMP runtime beside torch's would
// keep its threads spinning against torch's.
#include <unistd.h>

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>

#include "threads.h"

namespace {

// Threads that wait for work. They live as long as the process; a forked child
// has none of them and starts anew.
class Pool {
 public:
  void run(int threads, int64_t count, const Task &task) {
    std::unique_lock<std::mutex> lock(mutex_);
    while (started_ < threads - 1) {
      std::thread(&Pool::serve, this, started_++).detach();
    }
    task_ = &task;
    count_ = count;
    next_ = 0;
    wanted_ = working_ = threads - 1;
    round_++;
    lock.unlock();
    start_.notify_all();
    work();
    lock.lock();
    done_.wait(lock, [&] { return working_ == 0; });
  }

 private:
  void work() {
    for (int64_t i; (i = next_++) < count_;) (*task_)(i);
  }
  void serve(int number) {
    int64_t seen = 0;
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      start_.wait(lock, [&] { return round_ != seen && number < wanted_; });
      seen = round_;
      lock.unlock();
      work();
      lock.lock();
      if (--working_ == 0) done_.notify_one();
    }
  }

  std::mutex mutex_;
  std::condition_variable start_, done_;
  std::atomic<int64_t> next_{0};
  const Task *task_ = nullptr;
  int64_t count_ = 0, round_ = 0;
  int started_ = 0, wanted_ = 0, working_ = 0;
};

std::mutex turn;  // one call at a time has the pool
Pool *pool = nullptr;
pid_t owner = 0;

}  // namespace

void parallel(int threads, int64_t count, const Task &task) {
  if (threads > count) threads = (int)count;
  std::unique_lock<std::mutex> lock(turn, std::defer_lock);
  // Who calls from several threads at once has them busy already.
  if (threads <= 1 || !lock.try_lock()) {
    for (int64_t i = 0; i < count; i++) task(i);
    return;
  }
  if (owner != getpid()) {
    pool = new Pool;  // the parent's, if any, is lost with its threads
    owner = getpid();
  }
  pool->run(threads, count, task);
}
