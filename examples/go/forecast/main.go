// Forecasts one series from Go: numbers come in on standard input, three quantiles a step go out.
//
//	export PKG_CONFIG_PATH=...    # `diffusionz info` names the folder
//	seq 100 | go run ./forecast MODEL_FOLDER
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"

	"zimage-example/chronos"
)

func main() {
	if len(os.Args) != 2 {
		fmt.Fprintf(os.Stderr, "usage: %s MODEL_FOLDER < NUMBERS\n", os.Args[0])
		os.Exit(2)
	}
	if err := forecast(os.Args[1]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func forecast(model string) error {
	var series []float32
	for {
		var value float32
		if _, err := fmt.Scan(&value); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			return fmt.Errorf("number %d: %w", len(series)+1, err)
		}
		series = append(series, value)
	}
	ctx, err := chronos.NewContext(model, -1)
	if err != nil {
		return err
	}
	defer ctx.Close()
	stop, release := signal.NotifyContext(context.Background(), os.Interrupt)
	defer release()
	quantiles, err := ctx.Forecast(stop, [][]float32{series}, []float64{0.1, 0.5, 0.9}, 16)
	if err != nil {
		return err
	}
	for step := range quantiles[0][0] {
		fmt.Println(quantiles[0][0][step], quantiles[0][1][step], quantiles[0][2][step])
	}
	return nil
}
