// The main function of a probe that takes a plan: run(plan.json), an error is one line on standard error, exit status 1.
#pragma once

#include <exception>
#include <iostream>

template <class Run>
int plan_main(const char* name, int argc, char** argv, Run&& run) {
    if (argc != 2) {
        std::cerr << "usage: " << name << " PLAN.json\n";
        return 2;
    }
    try {
        run(argv[1]);
        return 0;
    } catch (const std::exception& e) {
        std::cerr << e.what() << '\n';
        return 1;
    }
}
