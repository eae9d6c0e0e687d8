// Sheafd is the router's daemon: it takes LAN clients' connections through all
// uplinks at once to a concentrator.
package main

import "os"

// version is set by -ldflags "-X main.version=…".
var version = "dev"

func main() {
	os.Exit(run(os.Args[1:], os.Stdout, os.Stderr))
}
