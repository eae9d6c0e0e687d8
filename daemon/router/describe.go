package router

import (
	"net/netip"
	"slices"

	"sheaf/daemon/control/desired"
	"sheaf/daemon/control/settings"
	"sheaf/daemon/datapath/bond"
	"sheaf/daemon/datapath/tunnel"
	"sheaf/webui"
)

// describePackets reports on everything that is not a TCP flow, and adds the
// carriers to the uplinks.
func (r *Router) describePackets(uplinks []webui.UplinkStatus, s settings.Settings) (webui.PacketStatus, []webui.ForwardStatus) {
	p := r.packets
	stats := p.bond.Stats()
	status := webui.PacketStatus{
		State: "down", MTU: desired.TunnelMTU, RxPackets: stats.Delivered.Packets,
		Duplicates: stats.Duplicates, Reordered: stats.Reordered, Drops: stats.Drops, TUNRestarts: p.device.Restarts(),
	}
	if stats.Alive {
		status.State = "up"
	}
	for _, sent := range stats.Sent {
		status.TxPackets += sent.Packets
	}
	// Here what is refused is what was not addressed to this router.
	status.Drops["spoofed"] = stats.Drops["refused"]
	delete(status.Drops, "refused")
	if device := p.device.Device(); device != nil {
		c := device.Counters()
		status.Drops["device"] = c.ReceiveDropped + c.WriteDropped
	}

	p.mu.Lock()
	defer p.mu.Unlock()
	if p.inner.Address4.IsValid() {
		status.Address4 = p.inner.Address4.String()
	}
	if p.inner.Address6.IsValid() {
		status.Address6 = p.inner.Address6.String()
	}
	if c := p.carriers[""]; c != nil && c.link != nil {
		status.StreamSessions = streamSessions
	}
	streamFit := false
	for _, l := range stats.Links {
		streamFit = streamFit || l.Kind == bond.Stream && l.Fit
	}
	for i := range uplinks {
		p.describeCarrierLocked(&uplinks[i], stats.Links, streamFit)
	}
	return status, p.describeForwardsLocked(s.Forwards, stats.Alive)
}

func (p *packets) describeCarrierLocked(u *webui.UplinkStatus, links []bond.LinkStats, streamFit bool) {
	c := p.carriers[u.Name]
	if c == nil {
		return // off, absent or unfit, or there is no concentrator
	}
	if i := slices.IndexFunc(links, func(l bond.LinkStats) bool { return l.Name == u.Name }); i >= 0 {
		l := links[i]
		u.PacketsTx, u.PacketsRx = l.SentPackets, l.ReceivedPackets
		if l.RTT > 0 {
			ms := float64(l.RTT.Microseconds()) / 1000
			u.PacketRTTMs, u.PacketLoss = &ms, &l.Loss
		}
		if l.Fit {
			u.Carrier = bond.Datagram.String()
			return
		}
		u.CarrierReason = "no answer to probes"
	}
	if c.reason != nil {
		u.CarrierReason = "no datagrams: " + c.reason.Error()
	}
	if streamFit && u.Subflows > 0 {
		u.Carrier = bond.Stream.String()
	}
}

// describeForwardsLocked tells what the concentrator has answered, as long as it
// holds: with the tunnel down nobody gets through.
func (p *packets) describeForwardsLocked(forwards []settings.Forward, alive bool) []webui.ForwardStatus {
	list := []webui.ForwardStatus{}
	pending, answers := "the concentrator has not answered yet", p.answer.Forwards
	if !alive {
		pending, answers = "the tunnel is down", nil
	}
	for _, f := range forwards {
		w := webui.ForwardStatus{
			Name: f.Name, Protocol: f.Protocol, Port: f.Port, To: f.To.String(), Source: string(f.Source),
			State: "pending", Reason: pending,
		}
		for _, a := range answers {
			if a.Port == (tunnel.Port{Protocol: f.Protocol, Port: f.Port}) {
				w.State, w.Reason = a.State, a.Reason
			}
		}
		list = append(list, w)
	}
	return list
}

// farMultipath is what the concentrator has said of how it sends.
func (p *packets) farMultipath() webui.FarMultipath {
	p.mu.Lock()
	defer p.mu.Unlock()
	return webui.FarMultipath{
		Scheduler: p.answer.Scheduler, Reason: p.answer.SchedulerReason,
		CongestionControl: p.answer.CongestionControl, CongestionControlReason: p.answer.CongestionControlReason,
	}
}

// describeDNS says where queries to the router itself go.
func describeDNS(server netip.Addr, through string) webui.DNSStatus {
	switch {
	case !server.IsValid():
		return webui.DNSStatus{}
	case through == "":
		through = "tunnel"
	default:
		through = "uplink " + through
	}
	return webui.DNSStatus{Server: server.String(), Through: through}
}
