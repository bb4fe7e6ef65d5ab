// robot_loop BUNDLE [PERIOD_MS] [TICKS]: a control loop at a fixed rate, driven by a model that is given one period.
//
// Every tick acts, on time. An action that has not come when its tick ends is a missed deadline: the loop holds the
// last action, and takes the late one when it is there. Whether that is safe is the robot's to say; here it is counted.
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <megalodon/runtime.hpp>
#include <thread>

#include "policy_worker.hpp"

namespace {

using Clock = std::chrono::steady_clock;

// A robot that sees a number and moves by another.
struct Robot {
    std::int64_t vocab_size;
    std::int64_t state = 1;
    std::int64_t observe() const { return state % vocab_size; }
    void act(std::int64_t action) { state = (5 * state + action + 1) % 1'000'003; }
};

struct Report {
    long ticks = 0, missed = 0;
    std::chrono::microseconds worst_jitter{0};
};

Report control(PolicyWorker& policy, Robot robot, std::chrono::microseconds period, long ticks) {
    Report report;
    std::int64_t action = 0;  // what the robot does until the first answer
    Clock::time_point deadline = Clock::now();
    for (; report.ticks < ticks; ++report.ticks) {
        const auto number = static_cast<std::uint64_t>(report.ticks);
        policy.post(robot.observe(), number);
        deadline += period;
        std::this_thread::sleep_until(deadline);
        const auto late = std::chrono::duration_cast<std::chrono::microseconds>(Clock::now() - deadline);
        if (late > report.worst_jitter) report.worst_jitter = late;
        const auto answer = policy.poll();
        if (answer) action = answer->token;
        if (!answer || answer->observation != number) ++report.missed;
        robot.act(action);
    }
    return report;
}

}  // namespace

int main(int argc, char** argv) {
    if (argc < 2) {
        std::fprintf(stderr, "usage: robot_loop BUNDLE [PERIOD_MS] [TICKS]\n");
        return 2;
    }
    try {
        const std::chrono::microseconds period(static_cast<long>(1000 * (argc > 2 ? std::atof(argv[2]) : 20.0)));
        const long ticks = argc > 3 ? std::atol(argv[3]) : 100;
        megalodon::SessionOptions options;
        options.threads = 1;  // leaves the other cores to the robot
        megalodon::Session session(megalodon::Bundle::open(argv[1]), options);
        PolicyWorker policy(session);
        const Report report = control(policy, {session.bundle().manifest().vocab_size}, period, ticks);
        std::printf("%ld ticks, %ld missed deadlines, worst jitter %lld us\n", report.ticks, report.missed,
                    static_cast<long long>(report.worst_jitter.count()));
    } catch (const megalodon::Error& error) {
        std::fprintf(stderr, "error: %s\n", error.what());
        return 2;
    }
    return 0;
}
