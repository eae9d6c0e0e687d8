package router

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"sync"
	"time"

	"sheaf/daemon/control/desired"
	"sheaf/daemon/control/kernel"
	"sheaf/daemon/control/reconcile"
	"sheaf/daemon/control/settings"
	"sheaf/daemon/datapath/tunnel"
	"sheaf/daemon/datapath/uplink"
	"sheaf/webui"
)

// measureEvery is how often rates and loss are measured.
const measureEvery = 2 * time.Second

// meter turns counters into rates.
type meter struct {
	mu    sync.Mutex
	at    time.Time
	bytes map[string][2]uint64 // by uplink: received, sent
	rates map[string][2]uint64 // bit/s
	sent  map[netip.AddrPort]segments
	loss  map[netip.Addr]float64 // by source address
}

// segments are a subflow's counters.
type segments struct{ sent, again uint32 }

// losses are those lately, by source address. The map is replaced, never changed.
func (m *meter) losses() map[netip.Addr]float64 {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.loss
}

// measure compares with the last time. A subflow is known by its local address
// and port.
func (m *meter) measure(now time.Time, statuses []uplink.Status, subflows []tunnel.Subflow) {
	m.mu.Lock()
	defer m.mu.Unlock()
	elapsed := now.Sub(m.at).Seconds()
	bytes, rates := map[string][2]uint64{}, map[string][2]uint64{}
	for _, s := range statuses {
		current := [2]uint64{s.ReceivedBytes, s.SentBytes}
		bytes[s.Name] = current
		last, ok := m.bytes[s.Name]
		if !ok || elapsed <= 0 || current[0] < last[0] || current[1] < last[1] {
			continue // the first look, or the interface was made anew
		}
		rates[s.Name] = [2]uint64{
			uint64(float64(current[0]-last[0]) * 8 / elapsed),
			uint64(float64(current[1]-last[1]) * 8 / elapsed),
		}
	}
	sent := map[netip.AddrPort]segments{}
	lately := map[netip.Addr]segments{}
	for _, f := range subflows {
		current := segments{f.Segments, f.Retransmitted}
		sent[f.Local] = current
		last := m.sent[f.Local]
		if current.sent < last.sent || current.again < last.again {
			last = segments{} // another subflow has the port now
		}
		sum := lately[f.Local.Addr()]
		lately[f.Local.Addr()] = segments{sum.sent + current.sent - last.sent, sum.again + current.again - last.again}
	}
	loss := map[netip.Addr]float64{}
	for a, l := range lately {
		switch {
		case l.sent > 0:
			loss[a] = min(1, float64(l.again)/float64(l.sent))
		default:
			loss[a] = m.loss[a] // nothing was sent: what was known holds
		}
	}
	m.at, m.bytes, m.rates, m.sent, m.loss = now, bytes, rates, sent, loss
}

// Status describes the router as it is now.
func (r *Router) Status(ctx context.Context) (webui.Status, error) {
	statuses, err := r.observe()
	if err != nil {
		return webui.Status{}, err
	}
	info, err := r.kernel.Info()
	if err != nil {
		return webui.Status{}, err
	}
	held, err := r.kernel.Read(ctx)
	if err != nil {
		return webui.Status{}, err
	}
	pool := r.pool.Status()
	r.mu.Lock()
	revision, enrolled, pass := r.revision, r.enrolled, r.lastPass
	r.mu.Unlock()
	r.meter.mu.Lock()
	rates, loss := r.meter.rates, r.meter.loss // replaced, never changed
	r.meter.mu.Unlock()

	s := webui.Status{
		Version:  r.config.Version,
		Kernel:   webui.KernelStatus{Release: info.Release, MPTCP: info.MPTCP, Connections: info.Connections, Subflows: info.Subflows},
		Settings: webui.SettingsStatus{Revision: revision.Number},
		Problems: []string{},
	}
	if u, err := r.Unconfirmed(ctx); err != nil {
		return webui.Status{}, err
	} else if u != nil {
		s.Settings.Unconfirmed = webui.NewUnconfirmed(*u, time.Now())
	}
	statuses = r.silence.apply(revision.Settings, statuses)
	single := oneUplink(revision.Settings.Multipath, info.MPTCP)
	s.Uplinks = describeUplinks(revision.Settings, statuses, pool, rates, loss, single)
	r.filling.describe(s.Uplinks)
	s.Packets, s.Forwards = r.describePackets(s.Uplinks, revision.Settings)
	s.DNS = describeDNS(desired.Resolver(revision.Settings, statuses, r.packets.state()))
	s.Tunnel = describeTunnel(revision.Settings, s.Uplinks, pool, single)
	s.Tunnel.Flows, s.Tunnel.DirectFlows = int(r.flows.Load()), r.direct.count()
	s.Multipath = describeMultipath(revision.Settings.Multipath, r.meshes(), info, held)
	s.Multipath.Kernel.CongestionControl = r.pool.CongestionControl()
	s.Multipath.SchedulerNote = r.note(revision.Settings)
	s.Multipath.Concentrator = r.packets.farMultipath()
	s.Concentrator = webui.ConcentratorStatus{Address: pool.Address, Sessions: pool.Sessions, IdleSessions: pool.Idle}
	if enrolled != nil {
		s.Concentrator.Fingerprint = enrolled.Key.Fingerprint()
		s.Concentrator.Name, _, _ = net.SplitHostPort(enrolled.Addresses[0])
		if s.Concentrator.Address == "" {
			s.Concentrator.Address = enrolled.Addresses[0]
		}
	}
	for _, name := range revision.Settings.LAN.Interfaces {
		_, err := net.InterfaceByName(name)
		s.LAN.Interfaces = append(s.LAN.Interfaces, webui.InterfaceStatus{Name: name, Present: err == nil})
	}
	s.Problems = problems(s, pass)
	return s, nil
}

const withoutMPTCP = "TCP flows use one uplink at a time: this kernel has no MPTCP"

// oneUplink says why sessions use one uplink at a time, or nothing when they use
// all.
func oneUplink(m settings.Multipath, mptcp string) string {
	switch {
	case !m.Enabled || m.PathManager == settings.PathManagerDefault || m.PathManager == settings.PathManagerNdiffports:
		return "one uplink at a time is used, as the multipath settings say"
	case mptcp == kernel.NoMPTCP:
		return withoutMPTCP
	}
	return ""
}

// describeUplinks decides the state of each uplink. One that carries nothing is
// never called carrying. single is what oneUplink says.
func describeUplinks(s settings.Settings, statuses []uplink.Status, pool tunnel.Status, rates map[string][2]uint64, loss map[netip.Addr]float64, single string) []webui.UplinkStatus {
	list := make([]webui.UplinkStatus, 0, len(statuses))
	carrying := false
	for i, u := range statuses {
		mode := modeOf(s, u.Name)
		w := webui.UplinkStatus{
			Name: u.Name, Interface: u.Interface, Mode: string(mode),
			RxBytes: u.ReceivedBytes, TxBytes: u.SentBytes, RxBps: rates[u.Name][0], TxBps: rates[u.Name][1],
			PlainTCP: slices.Contains(pool.Plain, u.Name),
		}
		var rtts []time.Duration
		for _, f := range pool.Subflows {
			if uplink.Of(statuses, f.Local) == i {
				w.Subflows++
				rtts = append(rtts, f.RTT)
			}
		}
		if len(u.Sources) > 0 {
			w.Address = u.Sources[0].Addr().String()
		}
		for _, source := range u.SubflowSources() {
			if l, ok := loss[source]; ok && w.Loss == nil {
				w.Loss = &l
			}
		}
		if w.LegReason = u.Leg.Reason; u.Leg.Up {
			w.Leg = "udp"
		}
		if len(u.Gateways) > 0 && !u.Gateways[0].IsUnspecified() {
			w.Gateway = u.Gateways[0].String()
		}
		if len(rtts) > 0 {
			slices.Sort(rtts)
			ms := float64(rtts[len(rtts)/2].Microseconds()) / 1000
			w.RTTMs = &ms
		}
		switch {
		case mode == settings.Off:
			w.State, w.Reason = "off", "switched off by the operator"
		case !u.Present():
			w.State, w.Reason = "absent", u.Reason
		case !u.Fit:
			w.State, w.Reason = "unfit", u.Reason
		case w.Subflows > 0:
			w.State = "carrying"
		case pool.Up && single == "" && s.Multipath.PathManager == settings.PathManagerNetlink:
			w.State, w.Reason = "standby", "path manager netlink: another program opens no subflow over it"
		case pool.Up && single != "":
			w.State, w.Reason = "standby", single
		default:
			w.State, w.Reason = "unfit", "no session reaches the concentrator over it"
			if w.LegReason != "" {
				w.Reason = w.LegReason
			} else if err := pool.Failed[u.Name]; err != nil {
				w.Reason = "the concentrator is not reached: " + err.Error()
			} else if pool.Reason != nil {
				w.Reason = pool.Reason.Error()
			}
		}
		carrying = carrying || w.State == "carrying" && mode == settings.On
		list = append(list, w)
	}
	for i := range list {
		if u := &list[i]; u.State == "carrying" && u.Mode == string(settings.Backup) && carrying {
			u.State, u.Reason = "standby", "backup, and an uplink that is on carries"
		}
	}
	return list
}

func describeTunnel(s settings.Settings, uplinks []webui.UplinkStatus, pool tunnel.Status, single string) webui.TunnelStatus {
	if !pool.Up {
		t := webui.TunnelStatus{State: "down"}
		if pool.Reason != nil {
			t.Reason = pool.Reason.Error()
		}
		return t
	}
	for _, u := range uplinks {
		switch {
		case u.Mode == string(settings.On) && u.State != "carrying" && u.State != "standby":
			return webui.TunnelStatus{State: "degraded", Reason: fmt.Sprintf("%s carries nothing: %s", u.Name, u.Reason)}
		case u.PlainTCP && s.Multipath.Enabled:
			return webui.TunnelStatus{State: "degraded", Reason: u.Name + ": something on its path strips MPTCP"}
		}
	}
	if single == withoutMPTCP {
		return webui.TunnelStatus{State: "degraded", Reason: single}
	}
	return webui.TunnelStatus{State: "up"}
}

func describeMultipath(want settings.Multipath, mesh bool, info kernel.Info, held desired.State) webui.MultipathStatus {
	m := webui.MultipathStatus{
		Wanted: webui.MultipathValues{Enabled: want.Enabled, PathManager: string(want.PathManager),
			Scheduler: want.Scheduler, Checksum: want.Checksum, SYNRetries: want.SYNRetries,
			CongestionControl: string(want.CongestionControl)},
		AvailableSchedulers:   info.Schedulers,
		AvailablePathManagers: []string{},
	}
	if info.MPTCP == kernel.OutOfTree {
		// Its switch is for every program: with it on, our sockets do as is wanted.
		m.Kernel.Enabled = want.Enabled && info.Sysctls["mptcp_enabled"] != "0"
		m.Kernel.Scheduler = info.Sysctls["mptcp_scheduler"]
		m.Kernel.PathManager = info.Sysctls["mptcp_path_manager"]
		m.Kernel.Checksum = info.Sysctls["mptcp_checksum"] == "1"
		m.Kernel.SYNRetries, _ = strconv.Atoi(info.Sysctls["mptcp_syn_retries"])
		for _, p := range settings.PathManagers {
			m.AvailablePathManagers = append(m.AvailablePathManagers, string(p))
		}
		return m
	}
	m.Kernel.Enabled = info.Sysctls["enabled"] == "1"
	m.Kernel.Scheduler = info.Sysctls["scheduler"]
	m.Kernel.Checksum = info.Sysctls["checksum_enabled"] == "1"
	m.Kernel.SYNRetries, _ = strconv.Atoi(info.Sysctls["syn_retrans_before_tcp_fallback"])
	userspace, offersUserspace := info.Userspace()
	for _, p := range settings.PathManagers {
		if offersUserspace || p == settings.PathManagerDefault || !p.Userspace() {
			m.AvailablePathManagers = append(m.AvailablePathManagers, string(p))
		}
	}
	m.Kernel.PathManager = string(kernelPathManager(want.PathManager, mesh, userspace, held.MPTCP))
	return m
}

// kernelPathManager is the path manager that what the kernel holds amounts to. mesh
// says that fullmesh is the daemon's.
func kernelPathManager(want settings.PathManager, mesh, userspace bool, held *desired.MPTCP) settings.PathManager {
	endpoints := held != nil && len(held.Endpoints) > 0
	switch {
	case userspace && (want.Userspace() || mesh && want == settings.PathManagerFullmesh):
		return want // which of these only the daemon knows
	case userspace || want == settings.PathManagerNetlink && !endpoints:
		return settings.PathManagerNetlink
	case endpoints && held.Limits.Subflows > 0:
		return settings.PathManagerFullmesh
	}
	return settings.PathManagerDefault
}

// problems lists what an operator should look at, most serious first.
func problems(s webui.Status, pass reconcile.Pass) []string {
	list := []string{}
	if s.Tunnel.State == "down" {
		list = append(list, s.Tunnel.Reason)
	}
	if pass.Err != nil {
		list = append(list, "the kernel does not take all of the settings: "+pass.Err.Error())
	}
	list = append(list, pass.Problems...)
	if far := s.Multipath.Concentrator; far.Reason != "" && s.Multipath.SchedulerNote == "" {
		list = append(list, "the concentrator sends by scheduler "+far.Scheduler+": "+far.Reason)
	}
	if c := string(settings.BBR); s.Multipath.Wanted.CongestionControl == c && s.Multipath.Kernel.CongestionControl != c {
		list = append(list, "the kernel does not let us use congestion control "+c+": load its module tcp_"+c)
	}
	if reason := s.Multipath.Concentrator.CongestionControlReason; reason != "" {
		list = append(list, "the concentrator sends with congestion control "+s.Multipath.Concentrator.CongestionControl+": "+reason)
	}
	for _, i := range s.LAN.Interfaces {
		if !i.Present {
			list = append(list, "LAN interface "+i.Name+" does not exist")
		}
	}
	for _, u := range s.Uplinks {
		if u.Mode != string(settings.Off) && (u.State == "absent" || u.State == "unfit") {
			list = append(list, u.Name+": "+u.Reason)
		}
		if u.PlainTCP {
			list = append(list, u.Name+": something on its path strips MPTCP, so sessions dialled over it do not join other uplinks")
		}
	}
	return list
}
