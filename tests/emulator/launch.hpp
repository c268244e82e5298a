// SPDX-License-Identifier: Apache-2.0
// The emulated kernel as a function of a shared library. Included after the kernel.
#pragma once

// Null, or what went wrong, until the next call.
extern "C" const char* emulate(const Params* params, int grid_x, int grid_y, int threads, int cluster, unsigned seed) {
    static std::string failure;
    try {
        machine::run([&] { FUSEDMLA_ENTRY(*params); }, {unsigned(grid_x), unsigned(grid_y)}, threads, cluster, seed);
        return nullptr;
    } catch (const machine::Failure& error) {
        failure = error.what();
        return failure.c_str();
    }
}
