// Package netlab builds a small Internet out of network namespaces: a LAN
// client, a router with several shaped uplinks, the Internet's core, a cloud
// VM for the concentrator, and a server. The demo, the end-to-end tests and
// the benchmarks run the real daemons in it.
//
//	LAN                Router                   Core                 Cloud
//	eth0 ──── lan0 ┤           ├ wan1 ═╗╔═ isp1 ┤      ├ cloud0 ──── eth0
//	192.168.77.2   │ forwards  ├ wan2 ═╬╬═ isp2 ┤ forw-│              203.0.113.10
//	fd77::2        │           ├ wan…  ═╝╚═ isp… ┤ ards │            Server
//	                                            │      ├ srv0 ────── eth0
//	                                                                  198.51.100.20
//
// The path of a frame over a shaped uplink:
//
//  1. The kernel of the sending side puts it into a TAP device (wan<i> or isp<i>).
//  2. emulator.go reads it there at once, so that no queue forms in the device.
//  3. queue.go decides, without I/O, when it reaches the far end, or why never.
//  4. emulator.go keeps it until then,
//  5. and writes it into the TAP device of the far end.
//
// sch_netem would do this in the kernel, but many kernels are built without it.
//
// What measures and tries the network stands beside it, each with its path at
// the top: probe.go and bulk.go (UDP), quic.go, ping.go (ICMP), capture.go (what
// an interface sees), inject.go (packets no kernel would send), dns.go.
//
// Everything lives exactly as long as the process: the namespaces have no name
// in the file system, the TAP devices are not persistent, and the processes
// started in a Host are killed by the kernel when this one dies (but not their
// own children, unless they ask for the same). So nothing is left behind, not
// even by kill -9.
//
// A child process inherits the namespace of its Host but the mounts of this
// process: /proc/sys/net and /proc/net are the Host's, /sys/class/net is not.
package netlab
