#include "chronos/quantiles.h"

#include <algorithm>
#include <cmath>

namespace diffusionz::chronos {
namespace {

// The value at `level`; level_of and value_of give the ascending known points by index.
template <class LevelOf, class ValueOf>
float value_at(double level, size_t count, LevelOf&& level_of, ValueOf&& value_of) {
    size_t upper = 0;
    for (size_t step = count; step > 0;) {  // the first point over `level`
        const size_t half = step / 2;
        if (level_of(upper + half) <= level) {
            upper += half + 1;
            step -= half + 1;
        } else {
            step = half;
        }
    }
    if (upper == 0) return value_of(0);
    if (upper == count) return value_of(count - 1);
    const double low = level_of(upper - 1), high = level_of(upper);
    const double below = value_of(upper - 1), above = value_of(upper);
    if (level == low || below == above) return value_of(upper - 1);  // whatever stands above it: it may be infinite or NaN
    return static_cast<float>(below + (level - low) / (high - low) * (above - below));
}

}  // namespace

bool same_level(double a, double b) { return std::abs(a - b) < 1e-6; }

void interpolate_quantiles(const std::vector<double>& known_levels, const float* values, const std::vector<double>& levels,
                           float* out) {
    for (size_t i = 0; i < levels.size(); ++i)
        out[i] = value_at(
            levels[i], known_levels.size(), [&](size_t k) { return known_levels[k]; }, [&](size_t k) { return values[k]; });
}

std::vector<double> probability_masses(const std::vector<double>& levels) {
    std::vector<double> masses(levels.size());
    double total = 0.0;
    for (size_t i = 0; i < levels.size(); ++i) {
        const double below = i == 0 ? 0.0 : levels[i - 1], above = i + 1 == levels.size() ? 1.0 : levels[i + 1];
        masses[i] = (above - below) / 2.0;
        total += masses[i];
    }
    for (double& mass : masses) mass /= total;
    return masses;
}

void weighted_quantiles(std::vector<Weighted>& samples, const std::vector<double>& levels, float* out) {
    std::sort(samples.begin(), samples.end(), [](const Weighted& a, const Weighted& b) { return nan_last(a.value, b.value); });
    double sum = 0.0;
    for (Weighted& sample : samples) sample.weight = sum += sample.weight;
    for (size_t i = 0; i < levels.size(); ++i)
        out[i] = value_at(
            levels[i], samples.size(), [&](size_t k) { return samples[k].weight; }, [&](size_t k) { return samples[k].value; });
}

}  // namespace diffusionz::chronos
