// Package zimage binds libdiffusionz. A Context is made once and used for many calls, from any goroutine: calls on one
// Context queue inside the library.
package zimage

/*
#cgo pkg-config: diffusionz
#include <diffusionz_c_api.h>
#include <stdlib.h>
*/
import "C"

import (
	"context"
	"fmt"
	"runtime"
	"unsafe"
)

// Context is a loaded model on a device.
type Context struct {
	ctx *C.DiffusionZContext
}

// Params say what to draw. Zero means the default: 1024 for Width and Height, 8 for Steps, 1 for LoraWeight.
type Params struct {
	Prompt         string
	NegativePrompt string
	Width, Height  int
	Steps          int
	GuidanceScale  float32
	Seed           int64
	LoraPath       string
	LoraWeight     float32
}

// Error is a status of the library and what it says about it.
type Error struct {
	Status  int
	Message string
}

func (e *Error) Error() string { return e.Message }

// NewContext loads the model in a folder on the CPU (device -1) or a CUDA device.
func NewContext(modelPath string, device int) (*Context, error) {
	path := C.CString(modelPath)
	defer C.free(unsafe.Pointer(path))
	// The library keeps the last error of each thread, and a goroutine may move to another one between two calls.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	ctx := C.diffusionz_init(path, C.int(device))
	if ctx == nil {
		return nil, fmt.Errorf("loading %s: %s", modelPath, C.GoString(C.diffusionz_last_error()))
	}
	return &Context{ctx}, nil
}

// Close frees the model. No call may run or follow.
func (c *Context) Close() {
	C.diffusionz_free(c.ctx)
	c.ctx = nil
}

// Generate draws a picture and returns it as a WebP file's bytes. It stops within one step once `stop` is done.
func (c *Context) Generate(stop context.Context, params Params) ([]byte, error) {
	// What a C struct points to must be C's own memory: the request is allocated there too.
	request := (*C.DiffusionZRequest)(C.malloc(C.sizeof_DiffusionZRequest))
	defer C.free(unsafe.Pointer(request))
	C.diffusionz_request_init(request)
	text := func(value string) *C.char {
		if value == "" {
			return nil
		}
		return C.CString(value)
	}
	request.prompt = C.CString(params.Prompt)
	request.negative_prompt = text(params.NegativePrompt)
	request.lora_path = text(params.LoraPath)
	defer C.free(unsafe.Pointer(request.prompt))
	defer C.free(unsafe.Pointer(request.negative_prompt))
	defer C.free(unsafe.Pointer(request.lora_path))
	if params.Width != 0 {
		request.width = C.int32_t(params.Width)
	}
	if params.Height != 0 {
		request.height = C.int32_t(params.Height)
	}
	if params.Steps != 0 {
		request.num_steps = C.int32_t(params.Steps)
	}
	request.guidance_scale = C.float(params.GuidanceScale)
	request.seed = C.int64_t(params.Seed)
	if params.LoraWeight != 0 {
		request.lora_weight = C.float(params.LoraWeight)
	}

	task := C.diffusionz_task_new()
	defer C.diffusionz_task_free(task)
	finished, watcher := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(watcher)
		select {
		case <-stop.Done():
			C.diffusionz_task_cancel(task)
		case <-finished:
		}
	}()
	result := (*C.DiffusionZResult)(C.calloc(1, C.sizeof_DiffusionZResult))
	defer C.free(unsafe.Pointer(result))
	status := C.diffusionz_generate_batch(c.ctx, request, 1, task, result)
	close(finished)
	<-watcher // the task is not freed under it
	defer C.diffusionz_free_result(result)
	if status != C.DIFFUSIONZ_OK {
		return nil, &Error{int(status), C.GoString(result.error_msg)}
	}
	return C.GoBytes(unsafe.Pointer(result.image_data), result.image_len), nil
}
