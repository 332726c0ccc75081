module zimage-example

go 1.19
