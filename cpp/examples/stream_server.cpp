// stream_server BUNDLE [CLIENTS] [SLOTS] [TOKENS]: client threads that each ask for completions, served in one batch.
//
// A stand-in for a network server: its request handlers would call StreamService::submit as the clients here do.
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <future>
#include <megalodon/runtime.hpp>
#include <vector>

#include "stream_service.hpp"

namespace {

constexpr int kRequestsPerClient = 3;

// Asks one prompt after the other; returns how many tokens came.
std::size_t client(StreamService& service, std::int64_t vocab_size, std::uint64_t number, std::size_t num_tokens) {
    std::size_t received = 0;
    for (std::uint64_t turn = 0; turn < kRequestsPerClient; ++turn) {
        StreamService::Request request{{}, num_tokens, {}};
        request.sampling.seed = number * kRequestsPerClient + turn;
        for (std::uint64_t index = 0; index < 5 + 20 * number; ++index) {
            request.prompt.push_back(
                static_cast<std::int64_t>((number + 7 * index) % static_cast<std::uint64_t>(vocab_size)));
        }
        received += service.submit(std::move(request)).get().size();
    }
    return received;
}

}  // namespace

int main(int argc, char** argv) {
    if (argc < 2) {
        std::fprintf(stderr, "usage: stream_server BUNDLE [CLIENTS] [SLOTS] [TOKENS]\n");
        return 2;
    }
    try {
        const auto num_clients = static_cast<std::size_t>(argc > 2 ? std::atol(argv[2]) : 8);
        const long num_slots = argc > 3 ? std::atol(argv[3]) : 4;
        const auto num_tokens = static_cast<std::size_t>(argc > 4 ? std::atol(argv[4]) : 32);
        megalodon::Session session(megalodon::Bundle::open(argv[1]));
        const std::int64_t vocab_size = session.bundle().manifest().vocab_size;
        StreamService service(session, num_slots);
        const auto start = std::chrono::steady_clock::now();
        std::vector<std::future<std::size_t>> clients;
        for (std::size_t number = 0; number < num_clients; ++number) {
            clients.push_back(
                std::async(std::launch::async, client, std::ref(service), vocab_size, number, num_tokens));
        }
        std::size_t total = 0;
        for (std::future<std::size_t>& received : clients)
            total += received.get();  // rethrows what ended that client
        const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
        std::printf("%zu requests, %zu tokens, %.0f tokens/s\n", num_clients * kRequestsPerClient, total,
                    static_cast<double>(total) / seconds.count());
    } catch (const megalodon::Error& error) {
        std::fprintf(stderr, "error: %s\n", error.what());
        return 2;
    }
    return 0;
}
