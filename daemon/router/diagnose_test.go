package router

import (
	"strings"
	"testing"

	"sheaf/daemon/datapath/uplink"
	"sheaf/webui"
)

func TestDiagnose(t *testing.T) {
	u := func(name, mode, state, reason string) webui.UplinkStatus {
		return webui.UplinkStatus{Name: name, Interface: "if-" + name, Mode: mode, State: state, Reason: reason, Address: "192.0.2.2", Gateway: "192.0.2.1"}
	}
	status := func(joined, up bool, uplinks ...webui.UplinkStatus) webui.Status {
		s := webui.Status{Uplinks: uplinks, Tunnel: webui.TunnelStatus{State: "down", Reason: "the concentrator does not answer"},
			LAN: webui.LANStatus{Interfaces: []webui.InterfaceStatus{{Name: "lan0", Present: true}}}}
		if joined {
			s.Concentrator.Address = "203.0.113.1:4443"
		}
		if up {
			s.Tunnel, s.Packets.State = webui.TunnelStatus{State: "up"}, "up"
			s.DNS = webui.DNSStatus{Server: "10.83.0.1", Through: "tunnel"}
		}
		return s
	}
	carries, backup, off := u("dsl", "on", "carrying", ""), u("lte", "backup", "standby", "backup"), u("sat", "off", "off", "switched off by the operator")
	gone := u("lte", "on", "absent", "interface if-lte does not exist")
	unplugged := u("dsl", "on", "unfit", "if-dsl has no carrier")
	silent := u("dsl", "on", "unfit", "the concentrator does not answer over it")
	silent2 := silent
	silent2.Name = "lte"
	noLAN := status(true, true, carries)
	noLAN.LAN.Interfaces = append(noLAN.LAN.Interfaces, webui.InterfaceStatus{Name: "lan1"})
	noUDP := status(true, true, carries)
	noUDP.Packets.State = "down"
	for name, test := range map[string]struct {
		status    webui.Status
		obstacles map[string]uplink.Obstacle // Past if not named
		verdict   string
		fix       string
		checks    string // letters: ok, failed, skipped, off - in their order
	}{
		"all is well":             {status(true, true, carries, backup, off), nil, "Everything works.", "", "ooooo ooooo - oooo o"},
		"nothing is set up":       {status(false, false), nil, "No uplink is set up.", "settings", "fssso"},
		"all is off":              {status(true, false, off), nil, "Every uplink is switched off.", "--mode on", "- ofss o"},
		"not joined":              {status(false, false, carries), nil, "has not joined", "sheafctl join TOKEN", "oooos fsss o"},
		"not joined, no cable":    {status(false, false, unplugged), map[string]uplink.Obstacle{"dsl": uplink.AtCarrier}, "Uplink dsl carries nothing: if-dsl has no carrier.", "Check the cable of if-dsl", "ofsss fsss o"},
		"one is missing":          {status(true, true, carries, gone), map[string]uplink.Obstacle{"lte": uplink.AtInterface}, "not over all uplinks. Uplink lte carries nothing", "Connect the modem or card of if-lte", "ooooo fssss oooo o"},
		"no address":              {status(true, true, carries, gone), map[string]uplink.Obstacle{"lte": uplink.AtAddress}, "not over all", "hands out addresses", "ooooo oofss oooo o"},
		"no gateway":              {status(true, true, carries, gone), map[string]uplink.Obstacle{"lte": uplink.AtGateway}, "not over all", "default route", "ooooo ooofs oooo o"},
		"one leads nowhere":       {status(true, true, backup, silent), nil, "Uplink dsl does not reach the concentrator", "Restart the modem of if-dsl", "ooooo oooof oooo o"},
		"nobody answers anywhere": {status(true, false, silent, silent2), nil, "No uplink reaches the concentrator 203.0.113.1:4443", "concentratord", "oooof oooof ofss o"},
		"two faults":              {status(true, false, unplugged, gone), map[string]uplink.Obstacle{"dsl": uplink.AtCarrier, "lte": uplink.AtInterface}, "No uplink works. Uplink dsl", "cable", "ofsss fssss ofss o"},
		"the LAN is missing":      {noLAN, nil, "Clients behind lan1 reach nothing", "lan.interfaces", "ooooo oooo of"},
		"UDP is lost":             {noUDP, nil, "TCP passes the tunnel, UDP", "log", "ooooo oofo o"},
	} {
		obstacles := map[string]uplink.Obstacle{}
		for _, u := range test.status.Uplinks {
			obstacles[u.Name] = uplink.Past
		}
		for name, at := range test.obstacles {
			obstacles[name] = at
		}
		d := diagnose(test.status, obstacles)
		got := ""
		for _, c := range d.Checks {
			got += map[string]string{"ok": "o", "failed": "f", "skipped": "s", "off": "-"}[c.State]
			if c.State == "failed" && c.Detail == "" {
				t.Errorf("%s: %s %s failed without a reason", name, c.Uplink, c.Name)
			}
		}
		if got != strings.ReplaceAll(test.checks, " ", "") {
			t.Errorf("%s: checks %s, want %s", name, got, test.checks)
		}
		if !strings.Contains(d.Verdict, test.verdict) || !strings.Contains(d.Fix, test.fix) || (test.fix == "") != (d.Fix == "") {
			t.Errorf("%s: %q, %q; want %q, %q", name, d.Verdict, d.Fix, test.verdict, test.fix)
		}
		if d.Healthy != !strings.Contains(got, "f") {
			t.Errorf("%s: healthy is %v with %s", name, d.Healthy, got)
		}
	}
}
