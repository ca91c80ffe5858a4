// Work that threads share, of which none waits for one that comes late: a thread that sleeps, or has no processor,
// takes nothing, and the caller does its part. (A parallel region of OpenMP ends when all its threads have come, however
// little is left to do: milliseconds on a machine that does other things, too.)
#pragma once
#include <pthread.h>
#ifdef __linux__
#include <sched.h>
#endif

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

inline void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Items [0, items), which threads take `chunk` at a time. `work` may be gone once all of them are done.
struct Job {
    const int64_t items, chunk;
    void (*const run)(const void* work, int64_t first, int64_t end);
    const void* const work;
    std::atomic<int> helpers;  // that may still join
    std::atomic<int64_t> next{0}, done{0};

    void help() {
        for (int64_t first; (first = next.fetch_add(chunk, std::memory_order_relaxed)) < items;) {
            const int64_t end = std::min(first + chunk, items);
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
    std::atomic<int64_t> version{0};  // of jobs
    std::vector<pthread_t> threads;
    int asleep = 0, avoided = -1;

    // Keep all off the processor of the caller, which needs it: the one that wakes a thread is where some kernels put
    // it. With the mutex held.
    void keep_off() {
#ifdef __linux__
        const int here = sched_getcpu();
        cpu_set_t others;
        if (here == avoided || pthread_getaffinity_np(pthread_self(), sizeof others, &others)) return;
        CPU_CLR(here, &others);
        if (CPU_COUNT(&others))
            for (const pthread_t thread : threads) pthread_setaffinity_np(thread, sizeof others, &others);
        avoided = here;
#endif
    }

    std::shared_ptr<Job> open_job() {  // with the mutex held
        for (auto& job : jobs)
            if (job->next.load(std::memory_order_relaxed) < job->items && job->helpers.fetch_sub(1) > 0) return job;
        return nullptr;
    }

    void live() {
        std::unique_lock<std::mutex> lock(mutex);
        for (;;) {
            if (auto job = open_job()) {
                lock.unlock();
                job->help();
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

    static Helpers*& current() {
        static Helpers* helpers = [] {
            // A forked process has none of its parent's threads.
            pthread_atfork(nullptr, nullptr, [] { current() = new Helpers; });
            return new Helpers;  // never deleted: its threads sleep to the end of the process
        }();
        return helpers;
    }

   public:
    static Helpers& get() { return *current(); }

    void open(const std::shared_ptr<Job>& job) {
        const std::lock_guard<std::mutex> lock(mutex);
        for (const int wanted = job->helpers; int(threads.size()) < wanted; avoided = -1) try {
                std::thread thread([this] { live(); });
                threads.push_back(thread.native_handle());
                thread.detach();
            } catch (const std::system_error&) {
                break;  // as many as the process may have
            }
        jobs.push_back(job);
        version++;
        if (asleep) {
            keep_off();
            woken.notify_all();
        }
    }

    void close(const std::shared_ptr<Job>& job) {
        const std::lock_guard<std::mutex> lock(mutex);
        jobs.erase(std::find(jobs.begin(), jobs.end(), job));
    }
};

// Call work(first, end) on parts of [0, items), by so many threads at most. Returns when all is done.
template <class Work>
void share(int64_t items, int64_t chunk, int threads, const Work& work) {
    if (threads <= 1 || items <= chunk) {
        if (items > 0) work(0, items);
        return;
    }
    auto run = [](const void* w, int64_t first, int64_t end) { (*static_cast<const Work*>(w))(first, end); };
    const std::shared_ptr<Job> job(new Job{items, chunk, run, &work, {threads - 1}});
    Helpers& helpers = Helpers::get();
    helpers.open(job);
    job->help();
    for (int turns = 0; job->done.load(std::memory_order_acquire) < items; turns++)
        if (turns < 1000) relax();
        else std::this_thread::yield();  // who holds the last items may wait for this processor
    helpers.close(job);
}
