/* Forecasts one series. This is the program of chronos_c_api.h's first screen, word for word.
 *
 *     export PKG_CONFIG_PATH=$(diffusionz info --json | python3 -c 'import json,sys; print(json.load(sys.stdin)["pkgconfig_dir"])')
 *     cc forecast.c -o forecast $(pkg-config --cflags --libs diffusionz)
 *     seq 100 | ./forecast MODEL_FOLDER
 */
#include <chronos_c_api.h>
#include <stdio.h>

int main(int argc, char **argv) {
    if (argc != 2) { fprintf(stderr, "usage: %s MODEL_FOLDER < NUMBERS\n", argv[0]); return 2; }
    float series[8192];
    int64_t offsets[2] = {0, 0};
    while (offsets[1] < 8192 && scanf("%f", &series[offsets[1]]) == 1) ++offsets[1];
    ChronosContext *ctx = chronos_init(argv[1], -1);
    if (!ctx) { fprintf(stderr, "%s\n", diffusionz_last_error()); return 1; }
    const double levels[3] = {0.1, 0.5, 0.9};
    ChronosRequest request;
    chronos_request_init(&request);
    request.row_count = 1;
    request.context = series;
    request.context_offsets = offsets;
    request.prediction_length = 16;
    request.quantile_levels = levels;
    request.level_count = 3;
    ChronosForecast forecast;
    int32_t status = chronos_forecast(ctx, &request, NULL, &forecast);
    if (status) fprintf(stderr, "%s\n", diffusionz_last_error());
    const float *q = forecast.quantiles; // [1, 3, 16]
    for (int step = 0; !status && step < 16; ++step) printf("%g %g %g\n", q[step], q[16 + step], q[32 + step]);
    chronos_free_forecast(&forecast);
    chronos_free(ctx);
    return status ? 1 : 0;
}
