{{- define "octavo.name" -}}
{{- printf "%s-operator" (.Release.Name | trunc 50 | trimSuffix "-") -}}
{{- end -}}

{{- /* Of objects that belong to no namespace: with the release's, so that two releases do not meet. */ -}}
{{- define "octavo.clusterName" -}}
{{- printf "%s-%s" .Release.Namespace (include "octavo.name" .) -}}
{{- end -}}

{{- define "octavo.selector" -}}
app.kubernetes.io/name: octavo-operator
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "octavo.commonLabels" -}}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end -}}

{{- define "octavo.labels" -}}
{{ include "octavo.selector" . }}
{{ include "octavo.commonLabels" . }}
{{- end -}}

{{- /* Of the pod of `helm test`, which must not answer for the operator's Service. */ -}}
{{- define "octavo.testSelector" -}}
app.kubernetes.io/name: octavo-operator-test
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "octavo.serviceAccount" -}}
{{- .Values.serviceAccount.name | default (include "octavo.name" .) -}}
{{- end -}}

{{- define "octavo.image" -}}
{{- if .Values.image.digest -}}
{{- printf "%s@%s" .Values.image.repository .Values.image.digest -}}
{{- else -}}
{{- printf "%s:%s" .Values.image.repository (.Values.image.tag | default .Chart.AppVersion) -}}
{{- end -}}
{{- end -}}

{{- /* What the restricted pod security standard asks of a pod, and of a container. No user id: the image has one, and
OpenShift gives each namespace its own. */ -}}
{{- define "octavo.podSecurity" -}}
runAsNonRoot: true
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{- define "octavo.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end -}}

{{- define "octavo.imagePullSecrets" -}}
{{- with .Values.imagePullSecrets -}}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end -}}
{{- end -}}
