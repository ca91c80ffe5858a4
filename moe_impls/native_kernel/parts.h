// The rows of experts in parts, so that no thread has all those of one with many.
#pragma once
#include <cstdint>
#include <vector>

struct ExpertRows {  // [first, end) of the rows of a call
    int64_t e, first, end;
};

// Parts of at most so many rows, of about the same size; experts without rows have none.
static std::vector<ExpertRows> parts_of(const int64_t* begin, int64_t E, int64_t most) {
    std::vector<ExpertRows> parts;
    for (int64_t e = 0; e < E; e++) {
        const int64_t first = begin[e] - begin[0], size = begin[e + 1] - begin[e], count = (size + most - 1) / most;
        for (int64_t i = 0; i < count; i++) parts.push_back({e, first + size * i / count, first + size * (i + 1) / count});
    }
    return parts;
}
