// Work that threads share, of which none waits for one that comes late: a thread that sleeps, or gets no processor,
// takes no part of it, and the caller does that. The caller waits for parts that are taken. (A parallel region of
// OpenMP ends when all its threads have come, however little is left to do: milliseconds on a machine that does other
// things, too. Its threads do the work only where they are awake anyway.)
#pragma once
#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#include "openmp.h"
#ifdef __linux__
#include <dirent.h>
#include <sched.h>

#include <cstdlib>
#endif

namespace {

// Items [0, items), of which each thread takes `chunk` at a time: first those of a range of its own one after the other,
// since what follows in memory is fetched already, then from the ends of what is left of others' ranges. `work` may be
// gone once all of them are done.
class Job {
    struct alignas(64) Range {  // where what is left of it begins, and in the upper half where it ends
        std::atomic<uint64_t> left;
    };

    const int64_t items, chunk;
    void (*const run)(const void* work, int64_t first, int64_t end);
    const void* const work;
    const int threads;
    const std::unique_ptr<Range[]> ranges;
    std::atomic<int> joined{0};
    alignas(64) std::atomic<int64_t> done{0};

    // Take items from the front of a range, or from its end.
    bool take(Range& range, bool front, int64_t& first, int64_t& end) const {
        uint64_t left = range.left.load(std::memory_order_relaxed), rest;
        int64_t some;
        do {
            first = uint32_t(left), end = left >> 32;
            some = std::min(chunk, end - first);
            if (some <= 0) return false;
            rest = front ? left + some : left - (uint64_t(some) << 32);
        } while (!range.left.compare_exchange_weak(left, rest, std::memory_order_relaxed));
        (front ? end : first) = front ? first + some : end - some;
        return true;
    }

   public:
    int helpers;  // that may still join

    Job(int64_t items, int64_t chunk, void (*run)(const void*, int64_t, int64_t), const void* work, int threads)
        : items(items), chunk(chunk), run(run), work(work), threads(threads), ranges(new Range[threads]),
          helpers(threads - 1) {
        for (int64_t i = 0; i < threads; i++)
            ranges[i].left = uint64_t(items * i / threads) | uint64_t(items * (i + 1) / threads) << 32;
    }

    bool is_open() const {
        return std::any_of(ranges.get(), ranges.get() + threads, [](const Range& range) {
            const uint64_t left = range.left.load(std::memory_order_relaxed);
            return uint32_t(left) < left >> 32;
        });
    }

    bool is_done() const { return done.load(std::memory_order_acquire) == items; }

    void help() noexcept {
        const int own = joined.fetch_add(1, std::memory_order_relaxed);
        for (int i = 0; i < threads; i++)
            for (int64_t first, end; take(ranges[(own + i) % threads], i == 0, first, end);) {
                run(work, first, end);
                done.fetch_add(end - first, std::memory_order_release);
            }
    }
};

// The threads of a process beside its own. They sleep when there has been no job for a while.
class Helpers {
    static constexpr std::chrono::microseconds AWAKE{50};  // after a job: the next one often follows at once
    std::mutex mutex;
    std::condition_variable woken;
    std::vector<std::shared_ptr<Job>> jobs;
    std::vector<pthread_t> threads;
    int asleep = 0;
    bool no_more = false;  // threads can be started
    alignas(64) std::atomic<int64_t> version{0};  // of jobs

    std::shared_ptr<Job> join() {  // with the mutex held
        for (auto& job : jobs)
            if (job->is_open() && job->helpers-- > 0) return job;
        return nullptr;
    }

    void live() {
#ifdef __linux__
        pthread_setname_np(pthread_self(), NAME);
#endif
        std::unique_lock<std::mutex> lock(mutex);
        for (;;) {
            if (auto job = join()) {
                lock.unlock();
                job->help();
                job.reset();
                lock.lock();
                continue;
            }
            const int64_t seen = version;
            lock.unlock();
            const auto end = std::chrono::steady_clock::now() + AWAKE;
            while (version.load(std::memory_order_relaxed) == seen && std::chrono::steady_clock::now() < end)
                for (int i = 0; i < 16; i++) relax();
            lock.lock();
            if (version == seen) {
                asleep++;
                woken.wait(lock, [&] { return version != seen; });
                asleep--;
            }
        }
    }

    void start(int wanted) {  // with the mutex held
        while (!no_more && int(threads.size()) < wanted) try {
                std::thread thread([this] { live(); });
                threads.push_back(thread.native_handle());
                thread.detach();
                placed = -1;
            } catch (const std::system_error&) {
                no_more = true;
            }
    }

    // Keep all threads off the processor of the caller: some kernels let a thread run where it is woken from, and two
    // of them then share that one while others are idle. With the mutex held.
    int placed = -1;  // for a caller on this processor, that may use these
#ifdef __linux__
    cpu_set_t placed_for;

    void place() {
        const int here = sched_getcpu();
        cpu_set_t own;
        if (here < 0 || sched_getaffinity(0, sizeof own, &own)) return;
        if (here == placed && CPU_EQUAL(&own, &placed_for)) return;
        placed = here;
        placed_for = own;
        cpu_set_t others = CPU_COUNT(&own) > 1 ? own : of_all_threads(own);
        CPU_CLR(here, &others);
        if (CPU_COUNT(&others))
            for (const pthread_t thread : threads) pthread_setaffinity_np(thread, sizeof others, &others);
    }

    // The processors of a process whose caller may use one alone, as where OpenMP binds each of its threads to one.
    static cpu_set_t of_all_threads(cpu_set_t all) {
        if (DIR* tasks = opendir("/proc/self/task")) {
            cpu_set_t one;
            while (const dirent* task = readdir(tasks))
                if (const int id = std::atoi(task->d_name); id > 0 && !sched_getaffinity(id, sizeof one, &one))
                    CPU_OR(&all, &all, &one);
            closedir(tasks);
        }
        return all;
    }
#else
    void place() {}
#endif

   public:
    void open(const std::shared_ptr<Job>& job) {
        int wake;
        {
            const std::lock_guard<std::mutex> lock(mutex);
            start(job->helpers);
            jobs.erase(std::remove_if(jobs.begin(), jobs.end(), [](auto& old) { return !old->is_open(); }), jobs.end());
            jobs.push_back(job);
            version++;
            wake = std::min(asleep, job->helpers);
            if ((wake || placed < 0) && jobs.size() == 1) place();
        }
        for (; wake > 0; wake--) woken.notify_one();
    }
};

// Of this process, never deleted: its threads live to the end. A forked process has none of its parent's, and none of
// OpenMP's either, which does not know that.
bool forked = false;
Helpers* helpers = (pthread_atfork(nullptr, nullptr, [] { forked = true, helpers = new Helpers; }), new Helpers);
thread_local OpenMP openmp;

// Call work(first, end) on parts of [0, items), by so many threads at most. Returns when all is done.
template <class Work>
void share(int64_t items, int64_t chunk, int threads, const Work& work) noexcept {
    const int all = threads;
    threads = int(std::min<int64_t>(threads, (items + chunk - 1) / chunk));
    if (threads <= 1) {
        if (items > 0) work(0, items);
        return;
    }
    auto run = [](const void* w, int64_t first, int64_t end) { (*static_cast<const Work*>(w))(first, end); };
    const std::shared_ptr<Job> job(new Job(items, chunk, run, &work, threads));
    if (!forked && openmp.is_awake(all)) {  // of fewer threads it would end the others
        openmp.run([](void* shared) { static_cast<Job*>(shared)->help(); }, job.get(), all);
    } else {
        helpers->open(job);
        job->help();
    }
    for (int turns = 0; !job->is_done(); turns++)
        if (turns < 1000)
            relax();
        else
            std::this_thread::yield();  // who holds the last parts may wait for this processor
}

}  // namespace
