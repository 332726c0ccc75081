// Draws one picture from Go.
//
//	export PKG_CONFIG_PATH=...    # `diffusionz info` names the folder
//	go run . MODEL_FOLDER "a red circle on a blue background" out.webp
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"

	"zimage-example/zimage"
)

func main() {
	if len(os.Args) != 4 {
		fmt.Fprintf(os.Stderr, "usage: %s MODEL_FOLDER PROMPT OUT.webp\n", os.Args[0])
		os.Exit(2)
	}
	if err := draw(os.Args[1], os.Args[2], os.Args[3]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func draw(model, prompt, file string) error {
	ctx, err := zimage.NewContext(model, -1)
	if err != nil {
		return err
	}
	defer ctx.Close()
	stop, release := signal.NotifyContext(context.Background(), os.Interrupt) // Ctrl-C stops within one step
	defer release()
	picture, err := ctx.Generate(stop, zimage.Params{Prompt: prompt, Width: 256, Height: 256, Seed: 7})
	if err != nil {
		return err
	}
	return os.WriteFile(file, picture, 0o666)
}
