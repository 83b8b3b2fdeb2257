// Command controlplane is etcd, kube-apiserver, kube-controller-manager, kube-scheduler and kubectl in one
// file: the first argument (or the name it is called by) picks the program. The packages that they share are
// compiled and linked once; each still runs as a process of its own, because they register the same global
// flags and metrics and end with os.Exit.
package main

import (
	"fmt"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"
	"go.etcd.io/etcd/server/v3/etcdmain"
	"k8s.io/component-base/cli"
	_ "k8s.io/component-base/metrics/prometheus/version"
	kubectl "k8s.io/kubectl/pkg/cmd"
	kubectlutil "k8s.io/kubectl/pkg/cmd/util"
	apiserver "k8s.io/kubernetes/cmd/kube-apiserver/app"
	controllermanager "k8s.io/kubernetes/cmd/kube-controller-manager/app"
	scheduler "k8s.io/kubernetes/cmd/kube-scheduler/app"
)

var programs = map[string]func() *cobra.Command{
	"kube-apiserver":          apiserver.NewAPIServerCommand,
	"kube-controller-manager": controllermanager.NewControllerManagerCommand,
	"kube-scheduler":          func() *cobra.Command { return scheduler.NewSchedulerCommand() },
	"kubectl":                 kubectl.NewDefaultKubectlCommand,
}

func main() {
	args := append([]string{filepath.Base(os.Args[0])}, os.Args[1:]...)
	if _, found := programs[args[0]]; !found && args[0] != "etcd" {
		args = args[1:]
	}
	if len(args) == 0 {
		usage()
	}
	if args[0] == "etcd" {
		etcdmain.Main(args)
		return
	}
	newCommand, found := programs[args[0]]
	if !found {
		usage()
	}
	os.Args = args
	if args[0] == "kubectl" {
		// kubectl reports its errors in a form of its own, without the usage text.
		kubectlutil.CheckErr(cli.RunNoErrOutput(newCommand()))
		return
	}
	os.Exit(cli.Run(newCommand()))
}

func usage() {
	fmt.Fprintln(os.Stderr, "usage: controlplane etcd|kube-apiserver|kube-controller-manager|kube-scheduler|kubectl [flags]")
	os.Exit(2)
}
