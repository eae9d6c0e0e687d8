package webui

import (
	"errors"
	"flag"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

var update = flag.Bool("update", false, "write the metrics as they are now into testdata")

// ours is the part of a scrape that is not about the process.
func ours(scrape string) string {
	var b strings.Builder
	for line := range strings.Lines(scrape) {
		if strings.HasPrefix(strings.TrimPrefix(strings.TrimPrefix(line, "# HELP "), "# TYPE "), "sheaf_") {
			b.WriteString(line)
		}
	}
	return b.String()
}

// compare compares with a file in testdata.
func compare(t *testing.T, file, got string) {
	t.Helper()
	file = "testdata/" + file
	if *update {
		if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), got); diff != "" {
		t.Errorf("-want +got\n%s", diff)
	}
}

// scrape asks for the metrics as Prometheus does.
func scrape(t *testing.T, c *Client) string {
	t.Helper()
	res, body := raw(t, c, request{method: "GET", path: "/metrics"})
	if mime := res.Header.Get("Content-Type"); res.StatusCode != 200 || !strings.HasPrefix(mime, "text/plain; version=0.0.4") {
		t.Fatalf("got %d %s\n%s", res.StatusCode, mime, body)
	}
	for _, process := range []string{"go_goroutines ", "process_resident_memory_bytes "} {
		if !strings.Contains(body, "\n"+process) {
			t.Errorf("there is no %s", process)
		}
	}
	return ours(body)
}

func TestRouterMetrics(t *testing.T) {
	router := &fakeRouter{status: Status{
		Version: "1.2",
		Tunnel:  TunnelStatus{State: "degraded", Flows: 42, DirectFlows: 1},
		Uplinks: []UplinkStatus{
			{Name: "dsl", Mode: "on", State: "carrying", RTTMs: new(12.5), Loss: new(0.25), RxBytes: 18_234_000_000, TxBytes: 921, Subflows: 8,
				Carrier: "datagram", PacketsTx: 5, PacketsRx: 6, PacketLoss: new(0.5), PacketRTTMs: new(11.0)},
			{Name: "lte", Mode: "backup", State: "absent"},
		},
		Concentrator: ConcentratorStatus{Sessions: 11, IdleSessions: 8},
		Settings:     SettingsStatus{Revision: 7},
		Problems:     []string{"lte is absent"},
		Packets: PacketStatus{State: "up", TxPackets: 81233, RxPackets: 120944, Duplicates: 411, Reordered: 7,
			Drops: map[string]uint64{"late": 3, "queue": 0}, TUNRestarts: 1},
		Forwards: []ForwardStatus{{Name: "web", Protocol: "tcp", State: "active"}, {Name: "game", Protocol: "udp", State: "refused"}},
	}}
	c := serve(t, NewRouterHandler(router, nil, quiet()))
	compare(t, "metrics_router.txt", scrape(t, c))
	check(t, nil, router.asked, "status")

	router.status = Status{Tunnel: TunnelStatus{State: "down"}, Packets: PacketStatus{State: "down"}}
	compare(t, "metrics_router_down.txt", scrape(t, c))

	router.err = errors.New("netlink: no buffer space")
	res, body := raw(t, c, request{method: "GET", path: "/metrics"})
	if res.StatusCode != 500 || !strings.Contains(body, `"code":"internal"`) || strings.Contains(body, "netlink") {
		t.Errorf("a status that fails: got %d %s", res.StatusCode, body)
	}
}

func TestConcentratorMetrics(t *testing.T) {
	con := &fakeConcentrator{routers: []EnrolledRouter{
		{Name: "home", LastSeen: &when, Sessions: 12, Flows: 3, RxBytes: 4, TxBytes: 5, PacketsRx: 6, PacketsTx: 7, Duplicates: 8, Reordered: 9,
			Drops: map[string]uint64{"spoofed": 10, "forbidden": 11},
			// No label can hold the last two, and they look alike in one that can.
			Carriers: []RouterCarrier{{"dsl", "datagram"}, {"", "stream"}, {"dsl", "datagram"}, {"a\xff\"\n", "datagram"}, {"a\xfe\"\n", "datagram"}},
			Forwards: []RouterForward{{Protocol: "tcp", Port: 8080}, {Protocol: "udp", Port: 8080}}},
		{Name: "office"},
	}}
	c := serve(t, NewConcentratorHandler(con, quiet()))
	compare(t, "metrics_concentrator.txt", scrape(t, c))

	con.err = errors.New("bbolt: page 3 is secret")
	res, body := raw(t, c, request{method: "GET", path: "/metrics"})
	if res.StatusCode != 500 || !strings.Contains(body, `"code":"internal"`) || strings.Contains(body, "bbolt") {
		t.Errorf("routers that fail: got %d %s", res.StatusCode, body)
	}
}

// The routers told are those seen last, in bounded number.
func TestConcentratorMetricsAreBounded(t *testing.T) {
	con := &fakeConcentrator{routers: []EnrolledRouter{{Name: "never"}}}
	for i := range maxMeteredRouters + 4 {
		con.routers = append(con.routers, EnrolledRouter{Name: fmt.Sprintf("r%d", i), LastSeen: new(when.Add(time.Duration(i) * time.Second))})
	}
	body := scrape(t, serve(t, NewConcentratorHandler(con, quiet())))
	if got := strings.Count(body, "\nsheaf_router_sessions{"); got != maxMeteredRouters {
		t.Errorf("%d routers are told, want %d", got, maxMeteredRouters)
	}
	for name, want := range map[string]bool{"never": false, "r3": false, "r4": true, fmt.Sprintf("r%d", maxMeteredRouters+3): true} {
		if strings.Contains(body, fmt.Sprintf("sheaf_router_sessions{router=%q}", name)) != want {
			t.Errorf("router %s is told: want %v", name, want)
		}
	}
	if !strings.Contains(body, fmt.Sprintf("\nsheaf_routers %d\n", maxMeteredRouters+5)) {
		t.Error("sheaf_routers does not count them all")
	}
}
