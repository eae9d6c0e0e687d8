package webui

// Status is the body of GET /api/v1/status. Its fields are those of the public
// contract: units are in the names, and absent measurements are null.
type Status struct {
	Version      string             `json:"version"`
	Tunnel       TunnelStatus       `json:"tunnel"`
	Uplinks      []UplinkStatus     `json:"uplinks"`
	Multipath    MultipathStatus    `json:"multipath"`
	Kernel       KernelStatus       `json:"kernel"`
	Concentrator ConcentratorStatus `json:"concentrator"`
	LAN          LANStatus          `json:"lan"`
	Settings     SettingsStatus     `json:"settings"`
	Packets      PacketStatus       `json:"packets"`
	Forwards     []ForwardStatus    `json:"forwards"`
	DNS          DNSStatus          `json:"dns"`
	// Problems are sentences an operator should read, most serious first.
	Problems []string `json:"problems"`
}

// TunnelStatus tells whether LAN traffic reaches the concentrator.
type TunnelStatus struct {
	// State is up (every uplink that is on carries subflows), degraded (traffic
	// flows, but not over all of them) or down.
	State  string `json:"state"`
	Reason string `json:"reason"`
	// Flows is the number of LAN connections in the tunnel now.
	Flows int `json:"flows"`
	// DirectFlows is the number of LAN connections that left without the
	// tunnel, because it was down when they began.
	DirectFlows int `json:"direct_flows"`
}

// UplinkStatus is one uplink as it is now.
type UplinkStatus struct {
	Name      string `json:"name"`
	Interface string `json:"interface"`
	Mode      string `json:"mode"`  // on, off, backup
	State     string `json:"state"` // carrying, standby, unfit, absent, off
	Reason    string `json:"reason"`
	Address   string `json:"address"` // source address, empty without one
	Gateway   string `json:"gateway"`
	// RTTMs is the smoothed round-trip time of its subflows, in milliseconds.
	RTTMs *float64 `json:"rtt_ms"`
	// Loss is the share of segments sent again lately, 0 to 1.
	Loss    *float64 `json:"loss"`
	RxBps   uint64   `json:"rx_bps"` // bits per second received by the interface
	TxBps   uint64   `json:"tx_bps"`
	RxBytes uint64   `json:"rx_bytes"`
	TxBytes uint64   `json:"tx_bytes"`
	// Subflows is the number of MPTCP subflows of live sessions on this uplink.
	Subflows int `json:"subflows"`
	// PlainTCP says that sessions over this uplink fell back to plain TCP:
	// something on the path strips MPTCP.
	PlainTCP bool `json:"plain_tcp"`
	// Leg is udp while subflows over this uplink go through WireGuard over UDP,
	// because LegReason: something on the path removes MPTCP options. With a reason
	// and no leg, MPTCP cannot use the uplink.
	Leg       string `json:"leg"`
	LegReason string `json:"leg_reason"`
	// Carrier is what takes packets other than TCP flows over this uplink:
	// datagram (a QUIC connection of its own), stream (MPTCP sessions that it
	// shares with other uplinks) or nothing.
	Carrier       string `json:"carrier"`
	CarrierReason string `json:"carrier_reason"` // why it is not datagram
	// PacketsTx to PacketRTTMs are of its datagram carrier. What the stream
	// carrier takes is spread by the kernel and counts in Packets alone.
	PacketsTx uint64 `json:"packets_tx"`
	PacketsRx uint64 `json:"packets_rx"`
	// PacketLoss is the share of packets lost lately, 0 to 1.
	PacketLoss *float64 `json:"packet_loss"`
	// PacketRTTMs is the smoothed round-trip time of packets, in milliseconds.
	PacketRTTMs *float64 `json:"packet_rtt_ms"`
}

// PacketStatus is the path of everything that is not a TCP flow. Its counters
// begin with the daemon.
type PacketStatus struct {
	State string `json:"state"` // up, down
	// Address4 and Address6 are the router's inner addresses, empty until the
	// concentrator has given them.
	Address4  string `json:"address4"`
	Address6  string `json:"address6"`
	MTU       int    `json:"mtu"`        // bytes
	TxPackets uint64 `json:"tx_packets"` // into the tunnel
	RxPackets uint64 `json:"rx_packets"` // out of the tunnel
	// Duplicates counts second copies of interactive packets, Reordered those
	// that were delivered after a later one.
	Duplicates uint64 `json:"duplicates"`
	Reordered  uint64 `json:"reordered"`
	// Drops counts the packets that were not delivered, by reason.
	Drops map[string]uint64 `json:"drops"`
	// TUNRestarts counts how often the TUN device was made anew.
	TUNRestarts uint64 `json:"tun_restarts"`
	// StreamSessions counts the MPTCP sessions that stand by for uplinks that let no
	// UDP through, beside those of concentrator.sessions.
	StreamSessions int `json:"stream_sessions"`
}

// ForwardStatus is one port forward of the settings.
type ForwardStatus struct {
	Name     string `json:"name"`
	Protocol string `json:"protocol"` // tcp, udp
	Port     uint16 `json:"port"`     // at the concentrator
	To       string `json:"to"`       // host:port in the LAN
	Source   string `json:"source"`   // client, router
	// State is active, refused by the concentrator, or pending as long as it
	// has not answered.
	State  string `json:"state"`
	Reason string `json:"reason"`
}

// DNSStatus tells where queries to the router's own address go.
type DNSStatus struct {
	Server  string `json:"server"`  // address; empty while nobody is asked
	Through string `json:"through"` // tunnel, "uplink NAME" or nothing
}

// MultipathStatus sets what the operator wants beside what the kernel does.
type MultipathStatus struct {
	Wanted MultipathValues `json:"wanted"`
	Kernel MultipathValues `json:"kernel"`
	// SchedulerNote says what is done instead of a scheduler that a kernel does not
	// have, and is approximated.
	SchedulerNote string `json:"scheduler_note,omitempty"`
	// Concentrator is what the other end does.
	Concentrator FarMultipath `json:"concentrator"`
	// Available lists what the running kernel offers.
	AvailableSchedulers   []string `json:"available_schedulers"`
	AvailablePathManagers []string `json:"available_path_managers"`
}

// FarMultipath tells by which packet scheduler and congestion control the
// concentrator sends, empty while it has not said so, and why one is not the one
// that is wanted.
type FarMultipath struct {
	Scheduler               string `json:"scheduler"`
	Reason                  string `json:"reason"` // of the scheduler
	CongestionControl       string `json:"congestion_control"`
	CongestionControlReason string `json:"congestion_control_reason"`
}

// MultipathValues are the multipath settings of one side.
type MultipathValues struct {
	Enabled     bool   `json:"enabled"`
	PathManager string `json:"path_manager"`
	Scheduler   string `json:"scheduler"`
	Checksum    bool   `json:"checksum"`
	SYNRetries  int    `json:"syn_retries"`
	// CongestionControl of the kernel is the choice that it lets flows follow.
	CongestionControl string `json:"congestion_control"`
}

// KernelStatus tells what the running kernel can do.
type KernelStatus struct {
	Release string `json:"release"`
	MPTCP   string `json:"mptcp"` // upstream, v0.9x, none
	// Connections and Subflows are the established ones that the kernel counts,
	// other programs' included. Only v0.9x does.
	Connections int `json:"connections,omitempty"`
	Subflows    int `json:"subflows,omitempty"`
}

// ConcentratorStatus is the far end.
type ConcentratorStatus struct {
	Name string `json:"name"`
	// Address is the one in use, host:port; empty before joining.
	Address string `json:"address"`
	// Fingerprint is of the concentrator's pinned key.
	Fingerprint string `json:"fingerprint"`
	// Sessions counts authenticated sessions, idle ones in the pool included.
	Sessions     int `json:"sessions"`
	IdleSessions int `json:"idle_sessions"`
}

// LANStatus is the side of the clients.
type LANStatus struct {
	Interfaces []InterfaceStatus `json:"interfaces"`
}

// InterfaceStatus is one LAN interface.
type InterfaceStatus struct {
	Name    string `json:"name"`
	Present bool   `json:"present"`
}

// SettingsStatus names the revision in force.
type SettingsStatus struct {
	Revision uint64 `json:"revision"`
}
