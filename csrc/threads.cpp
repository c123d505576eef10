// The library's own thread pool. A second OpenMP runtime in the process would
// have its idle threads compete with torch's for the cores.
#include <unistd.h>

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>

#include "threads.h"

namespace {

// Threads that wait for work as long as the process lives. A forked child has
// none of them, and makes a pool of its own.
class Pool {
 public:
  void run(int threads, int64_t count, const Task &task) {
    std::unique_lock<std::mutex> lock(mutex_);
    while (num_started_ < threads - 1)
      std::thread(&Pool::serve, this, num_started_++).detach();
    task_ = &task;
    count_ = count;
    next_ = 0;
    num_chosen_ = num_working_ = threads - 1;
    round_++;
    lock.unlock();
    start_.notify_all();
    work();
    lock.lock();
    done_.wait(lock, [&] { return num_working_ == 0; });
  }

 private:
  void work() {
    for (int64_t i; (i = next_++) < count_;) (*task_)(i);
  }
  void serve(int number) {
    int64_t seen = 0;
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      start_.wait(lock, [&] { return round_ != seen && number < num_chosen_; });
      seen = round_;
      lock.unlock();
      work();
      lock.lock();
      if (--num_working_ == 0) done_.notify_one();
    }
  }

  std::mutex mutex_;
  std::condition_variable start_, done_;
  std::atomic<int64_t> next_{0};
  const Task *task_ = nullptr;
  int64_t count_ = 0, round_ = 0;
  int num_started_ = 0, num_chosen_ = 0, num_working_ = 0;
};

std::mutex pool_mutex;  // held by the call that uses the pool
Pool *pool = nullptr;
pid_t owner = 0;

}  // namespace

void parallel(int threads, int64_t count, const Task &task) {
  if (threads > count) threads = (int)count;
  std::unique_lock<std::mutex> lock(pool_mutex, std::defer_lock);
  // If another thread uses the pool, the cores are busy already.
  if (threads <= 1 || !lock.try_lock()) {
    for (int64_t i = 0; i < count; i++) task(i);
    return;
  }
  if (owner != getpid()) {
    pool = new Pool;  // after a fork, the parent's pool has no threads here
    owner = getpid();
  }
  pool->run(threads, count, task);
}
