// Sheafd is the router's daemon: it takes LAN clients' connections through all
// uplinks at once to a concentrator.
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
