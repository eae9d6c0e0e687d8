// Sheafctl drives a running sheafd from a terminal or a script.
//
// The path of a command: arguments ─▶ run ─▶ webui.Client ─▶ the daemon's unix
// socket ─▶ data on stdout, messages on stderr, an exit code.
package main

import "os"

// version is set by -ldflags "-X main.version=…".
var version = "dev"

func main() {
	os.Exit(run(os.Args[1:], os.Stdin, os.Stdout, os.Stderr))
}
