// Concentratord ends the tunnels of its routers and takes their traffic to the
// Internet. It runs on an ordinary Linux machine with a stock kernel.
package main

import (
	"os"

	"sheaf/cmd/internal/daemon"
)

// version is set by -ldflags "-X main.version=…".
var version = "dev"

func main() {
	os.Exit(daemon.Main(newCommand(), os.Args[1:], os.Stdout, os.Stderr))
}
