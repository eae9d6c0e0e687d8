// Sheafd is the router's daemon: it takes LAN clients' connections through all
// uplinks at once to a concentrator.
package main

import (
	"os"
	"runtime/debug"
)

// version is set by -ldflags "-X main.version=…".
var version = "dev"

func main() {
	// The heap is small and its buffers are pooled: collecting it twice as often
	// costs next to nothing and saves a tenth of the memory.
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(50)
	}
	os.Exit(run(os.Args[1:], os.Stdout, os.Stderr))
}
