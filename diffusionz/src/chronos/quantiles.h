// Quantiles of one step, as chronos-forecasting's utils.py interpolates and mixes them.
#pragma once

#include <cmath>
#include <vector>

namespace diffusionz::chronos {

// Levels are compared so, not by their bits: 0.1 * 3 is 0.30000000000000004.
bool same_level(double a, double b);

// Whether a stands before b: the order for sorting what may hold NaN, as a damaged checkpoint's forecasts do.
inline bool nan_last(float a, float b) { return a < b || (std::isnan(b) && !std::isnan(a)); }

// Values at `levels` on the straight lines between (known_levels, values), known_levels ascending; flat outside.
void interpolate_quantiles(const std::vector<double>& known_levels, const float* values, const std::vector<double>& levels,
                           float* out);

// The share of probability that each level stands for: half the way to its neighbours, 0 and 1 at the ends. Sums to 1.
std::vector<double> probability_masses(const std::vector<double>& levels);

// A sample and its weight.
struct Weighted {
    float value;
    double weight;
};

// Quantiles of weighted samples, whose weights sum to 1, at `levels`. Sorts `samples`.
void weighted_quantiles(std::vector<Weighted>& samples, const std::vector<double>& levels, float* out);

}  // namespace diffusionz::chronos
