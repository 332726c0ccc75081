// Package chronos binds the forecasting half of libdiffusionz. A Context is made once and used for many calls, from any
// goroutine: calls on one Context queue inside the library.
package chronos

/*
#cgo pkg-config: diffusionz
#include <chronos_c_api.h>
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
	ctx *C.ChronosContext
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
	ctx := C.chronos_init(path, C.int32_t(device))
	if ctx == nil {
		return nil, fmt.Errorf("loading %s: %s", modelPath, C.GoString(C.diffusionz_last_error()))
	}
	return &Context{ctx}, nil
}

// Close frees the model. No call may run or follow.
func (c *Context) Close() {
	C.chronos_free(c.ctx)
	c.ctx = nil
}

// inC copies values to C's own memory, which what a C struct points to must be. The caller frees it.
func inC[Value any](values []Value) unsafe.Pointer {
	var value Value
	memory := C.malloc(C.size_t(len(values)+1) * C.size_t(unsafe.Sizeof(value)))
	copy(unsafe.Slice((*Value)(memory), len(values)), values)
	return memory
}

// Forecast gives the quantiles of each series' next steps, as [series][level][step]. NaN in a series is a missing value.
// It stops within one chunk of rows once `stop` is done.
func (c *Context) Forecast(stop context.Context, series [][]float32, levels []float64, steps int) ([][][]float32, error) {
	var values []float32
	offsets := []int64{0}
	for _, row := range series {
		values = append(values, row...)
		offsets = append(offsets, int64(len(values)))
	}
	request := (*C.ChronosRequest)(C.malloc(C.sizeof_ChronosRequest))
	defer C.free(unsafe.Pointer(request))
	C.chronos_request_init(request)
	request.row_count = C.int64_t(len(series))
	request.context = (*C.float)(inC(values))
	request.context_offsets = (*C.int64_t)(inC(offsets))
	request.quantile_levels = (*C.double)(inC(levels))
	defer C.free(unsafe.Pointer(request.context))
	defer C.free(unsafe.Pointer(request.context_offsets))
	defer C.free(unsafe.Pointer(request.quantile_levels))
	request.level_count = C.int32_t(len(levels))
	request.prediction_length = C.int64_t(steps)

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
	forecast := (*C.ChronosForecast)(C.calloc(1, C.sizeof_ChronosForecast))
	defer C.free(unsafe.Pointer(forecast))
	runtime.LockOSThread() // for the last error, as above
	defer runtime.UnlockOSThread()
	status := C.chronos_forecast(c.ctx, request, task, forecast)
	close(finished)
	<-watcher // the task is not freed under it
	defer C.chronos_free_forecast(forecast)
	if status != C.DIFFUSIONZ_OK {
		return nil, &Error{int(status), C.GoString(C.diffusionz_last_error())}
	}
	count := int(forecast.level_count)
	flat := unsafe.Slice((*float32)(forecast.quantiles), int(forecast.target_count)*count*steps)
	quantiles := make([][][]float32, forecast.target_count)
	for i := range quantiles {
		quantiles[i] = make([][]float32, count)
		for level := range quantiles[i] {
			begin := (i*count + level) * steps
			quantiles[i][level] = append([]float32(nil), flat[begin:begin+steps]...)
		}
	}
	return quantiles, nil
}
