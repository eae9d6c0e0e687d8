package webui

// The path of a scrape:
//
//	GET /metrics ─▶ the daemon's Status, or its routers ─▶ samples (pure)
//	             ─▶ a registry of this one scrape, and the runtime's ─▶ text
//
// Everything is read when it is asked for, so nothing is counted twice and a
// daemon that nobody watches pays nothing.

import (
	"cmp"
	"log/slog"
	"maps"
	"slices"
	"strings"

	"github.com/gin-gonic/gin"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// maxMeteredRouters bounds the series of a concentrator: every router has about
// twenty. Those seen last are told; sheaf_routers counts them all.
const maxMeteredRouters = 1000

// replacement stands for what is not UTF-8, which no label may hold.
const replacement = "\uFFFD"

// samples is what one scrape tells.
type samples []prometheus.Metric

// Describe tells nothing beforehand: which series there are is known at the
// scrape.
func (s *samples) Describe(chan<- *prometheus.Desc) {}

// Collect hands over the samples.
func (s *samples) Collect(to chan<- prometheus.Metric) {
	for _, m := range *s {
		to <- m
	}
}

// label is one label of a series.
type label struct{ name, value string }

func (s *samples) gauge(name, help string, value float64, labels ...label) {
	s.add(prometheus.GaugeValue, name, help, value, labels)
}

func (s *samples) counter(name, help string, value uint64, labels ...label) {
	s.add(prometheus.CounterValue, name, help, float64(value), labels)
}

func (s *samples) add(kind prometheus.ValueType, name, help string, value float64, labels []label) {
	names, values := make([]string, len(labels)), make([]string, len(labels))
	for i, l := range labels {
		// Some values come from the other end of a tunnel.
		names[i], values[i] = l.name, strings.ToValidUTF8(l.value, replacement)
	}
	*s = append(*s, prometheus.MustNewConstMetric(prometheus.NewDesc(name, help, names, nil), kind, value, values...))
}

// directions tells packets of both directions as one metric.
func (s *samples) directions(name, help string, rx, tx uint64, labels ...label) {
	s.counter(name, help, rx, append(slices.Clone(labels), label{"direction", "rx"})...)
	s.counter(name, help, tx, append(slices.Clone(labels), label{"direction", "tx"})...)
}

func oneIf(b bool) float64 {
	if b {
		return 1
	}
	return 0
}

// routerSamples tells a router's status. What was not measured has no sample.
func routerSamples(s Status) *samples {
	out := &samples{}
	out.gauge("sheaf_build_info", "The version that runs; always 1.", 1, label{"version", s.Version})
	out.gauge("sheaf_tunnel_up", "1 while LAN traffic reaches the concentrator, over all uplinks or some.",
		oneIf(s.Tunnel.State == "up" || s.Tunnel.State == "degraded"))
	out.gauge("sheaf_flows", "LAN connections in the tunnel now.", float64(s.Tunnel.Flows))
	out.gauge("sheaf_direct_flows", "LAN connections that go without the tunnel now.", float64(s.Tunnel.DirectFlows))
	out.gauge("sheaf_sessions", "Authenticated sessions with the concentrator, idle ones included.", float64(s.Concentrator.Sessions))
	out.gauge("sheaf_idle_sessions", "Sessions that carry no flow.", float64(s.Concentrator.IdleSessions))
	out.gauge("sheaf_settings_revision", "The revision of the settings in force.", float64(s.Settings.Revision))
	out.gauge("sheaf_problems", "Sentences that an operator should read in the status.", float64(len(s.Problems)))

	p := s.Packets
	out.gauge("sheaf_packets_up", "1 while packets other than TCP flows reach the concentrator.", oneIf(p.State == "up"))
	out.directions("sheaf_packets_total", "Packets into (tx) and out of (rx) the tunnel.", p.RxPackets, p.TxPackets)
	out.counter("sheaf_packet_duplicates_total", "Second copies of interactive packets that arrived.", p.Duplicates)
	out.counter("sheaf_packet_reordered_total", "Packets that were delivered after a later one.", p.Reordered)
	for _, reason := range slices.Sorted(maps.Keys(p.Drops)) {
		out.counter("sheaf_packet_drops_total", "Packets that were not delivered.", p.Drops[reason], label{"reason", reason})
	}
	out.counter("sheaf_tun_restarts_total", "How often the TUN device was made anew.", p.TUNRestarts)

	for _, u := range s.Uplinks {
		of := label{"uplink", u.Name}
		out.gauge("sheaf_uplink_info", "The carrier of packets, the state and the mode of an uplink; always 1.", 1,
			of, label{"carrier", u.Carrier}, label{"state", u.State}, label{"mode", u.Mode})
		out.counter("sheaf_uplink_rx_bytes_total", "Bytes received by the interface.", u.RxBytes, of)
		out.counter("sheaf_uplink_tx_bytes_total", "Bytes sent by the interface.", u.TxBytes, of)
		out.gauge("sheaf_uplink_subflows", "MPTCP subflows of live sessions.", float64(u.Subflows), of)
		if u.RTTMs != nil {
			out.gauge("sheaf_uplink_rtt_seconds", "Smoothed round-trip time of the subflows.", *u.RTTMs/1000, of)
		}
		if u.Loss != nil {
			out.gauge("sheaf_uplink_loss_ratio", "Share of TCP segments sent again lately, 0 to 1.", *u.Loss, of)
		}
		out.directions("sheaf_uplink_packets_total", "Packets of the datagram carrier.", u.PacketsRx, u.PacketsTx, of)
		if u.PacketRTTMs != nil {
			out.gauge("sheaf_uplink_packet_rtt_seconds", "Smoothed round-trip time of packets.", *u.PacketRTTMs/1000, of)
		}
		if u.PacketLoss != nil {
			out.gauge("sheaf_uplink_packet_loss_ratio", "Share of packets lost lately, 0 to 1.", *u.PacketLoss, of)
		}
	}
	for _, f := range s.Forwards {
		out.gauge("sheaf_forward_active", "1 for a forward that the concentrator has opened.", oneIf(f.State == "active"),
			label{"forward", f.Name}, label{"protocol", f.Protocol})
	}
	return out
}

// concentratorSamples tells the routers of a concentrator.
func concentratorSamples(routers []EnrolledRouter) *samples {
	out := &samples{}
	out.gauge("sheaf_routers", "Enrolled routers.", float64(len(routers)))
	if len(routers) > maxMeteredRouters {
		routers = slices.SortedStableFunc(slices.Values(routers), func(a, b EnrolledRouter) int {
			return -cmp.Compare(lastSeen(a), lastSeen(b))
		})[:maxMeteredRouters]
	}
	for _, r := range routers {
		of := label{"router", r.Name}
		out.gauge("sheaf_router_sessions", "Authenticated sessions of a router.", float64(r.Sessions), of)
		out.gauge("sheaf_router_flows", "Connections of a router's LAN now.", float64(r.Flows), of)
		if r.LastSeen != nil {
			out.gauge("sheaf_router_last_seen_timestamp_seconds", "When a router was last seen, in Unix time.", lastSeen(r), of)
		}
		out.counter("sheaf_router_rx_bytes_total", "Bytes of flows received from a router.", r.RxBytes, of)
		out.counter("sheaf_router_tx_bytes_total", "Bytes of flows sent to a router.", r.TxBytes, of)
		out.directions("sheaf_router_packets_total", "Packets from (rx) and to (tx) a router.", r.PacketsRx, r.PacketsTx, of)
		out.counter("sheaf_router_packet_duplicates_total", "Second copies of interactive packets that arrived.", r.Duplicates, of)
		out.counter("sheaf_router_packet_reordered_total", "Packets that were delivered after a later one.", r.Reordered, of)
		for _, reason := range slices.Sorted(maps.Keys(r.Drops)) {
			out.counter("sheaf_router_packet_drops_total", "Packets that were not delivered.", r.Drops[reason], of, label{"reason", reason})
		}
		// A carrier and the one that takes its place may be there at once.
		told := map[RouterCarrier]bool{}
		for _, c := range r.Carriers {
			c.Link = strings.ToValidUTF8(c.Link, replacement)
			if !told[c] {
				out.gauge("sheaf_router_carrier_info", "A carrier of a router's packets; always 1.", 1,
					of, label{"link", c.Link}, label{"carrier", c.Carrier})
			}
			told[c] = true
		}
		out.gauge("sheaf_router_forwards", "Ports opened for a router.", float64(len(r.Forwards)), of)
	}
	return out
}

// lastSeen is Unix time in seconds, and 0 for a router never seen.
func lastSeen(r EnrolledRouter) float64 {
	if r.LastSeen == nil {
		return 0
	}
	return float64(r.LastSeen.UnixMilli()) / 1000
}

// newRuntimeMetrics tells about the process: memory, descriptors, goroutines.
func newRuntimeMetrics() prometheus.Gatherer {
	r := prometheus.NewRegistry()
	r.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return r
}

// metrics answers a scrape in the text format of Prometheus.
func (rp reply) metrics(c *gin.Context, runtime prometheus.Gatherer, s *samples) {
	scrape := prometheus.NewRegistry()
	scrape.MustRegister(s)
	promhttp.HandlerFor(prometheus.Gatherers{scrape, runtime}, promhttp.HandlerOpts{
		ErrorLog: slog.NewLogLogger(rp.log.Handler(), slog.LevelError),
	}).ServeHTTP(c.Writer, c.Request)
}
